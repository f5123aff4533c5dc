"""Folders of the hub's cache, by the layout that huggingface_hub documents."""

from turboq.hub_cache import model_name, snapshot_hint


def test_a_snapshot_is_called_as_its_model(tmp_path):
    snapshot = tmp_path / "models--org--Some-1.5B" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "Some-1.5B"
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(tmp_path / "link") == "Some-1.5B"
    for other in (tmp_path / "mine", tmp_path / "mine" / "snapshots" / "0123abc"):
        assert model_name(other) == other.name


def test_the_hint_names_the_snapshot_of_main_else_one_that_is_there(tmp_path):
    assert snapshot_hint(tmp_path) == ""
    for commit in ("aaa", "bbb"):
        (tmp_path / "snapshots" / commit).mkdir(parents=True)
    assert snapshot_hint(tmp_path).endswith("snapshots/bbb)")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("aaa\n")
    assert snapshot_hint(tmp_path).endswith("snapshots/aaa)")
    (tmp_path / "refs" / "main").write_text("gone")
    assert snapshot_hint(tmp_path).endswith("snapshots/bbb)")
