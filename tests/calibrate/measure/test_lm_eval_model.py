"""The model of lm-evaluation-harness on tasks from local files.

The harness's own accuracy and perplexity are checked against the model's logits.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from turboq.errors import TurboqError, TurboqWarning
from turboq_calibrate.measure.generate import greedy
from turboq_calibrate.models import forward, load_model

GOLDEN = Path(__file__).parents[2] / "golden" / "llama3"

CHOICE = """
task: turboq_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITE = """
task: turboq_write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLL = """
task: turboq_roll
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
QUESTIONS = ("the cat", "a dog sat on", "x = 3", "where is it")
CHOICES = [" one", " two words", " 3"]


def test_local_tasks_score_what_the_models_logits_say(tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from turboq_calibrate.measure.lm_eval_model import TurboqLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_model(GOLDEN)
    encode = model.tokenizer.encode
    first = [] if not model.tokenizer.adds_bos else [model.tokenizer.bos_id]

    def logp(context, continuation):
        ids = np.array([[*context, *continuation]])
        logits = np.asarray(forward(model, ids)[0], np.float64)[0]
        each = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return sum(each[len(context) - 1 + n, t] for n, t in enumerate(continuation))

    docs, right = [], 0
    for question in QUESTIONS:
        context = [*first, *encode(question)]
        scores = []
        for choice in CHOICES:
            whole = [*first, *encode(question + choice)]
            scores.append(logp(whole[: len(context)], whole[len(context) :]))
        answer = int(np.argmax(scores)) if len(docs) % 2 else 0
        right += answer == np.argmax(scores)
        written = model.tokenizer.decode(greedy(model, np.array([context]), 4).tokens[0])
        docs.append({
            "question": question, "choices": CHOICES, "answer": answer,
            "written": written if len(docs) else "never",
        })  # fmt: skip
    data = tmp_path / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("roll", ROLL)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    made = f"pretrained={GOLDEN},codec=f32"  # as the command makes it
    lm = TurboqLM.create_from_arg_string(made, {"batch_size": 3, "device": "cuda:0"})
    names = ["turboq_choice", "turboq_write", "turboq_roll"]
    found = lm_eval.simple_evaluate(
        model=lm, tasks=names, task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )  # fmt: skip
    assert found is not None
    results = found["results"]
    assert results["turboq_choice"]["acc,none"] == right / len(QUESTIONS)
    assert results["turboq_write"]["exact_match,none"] == (len(QUESTIONS) - 1) / len(QUESTIONS)
    total = sum(logp([lm.prefix_token_id], encode(question)) for question in QUESTIONS)
    due = np.exp(-total / sum(len(q.encode()) for q in QUESTIONS))
    assert results["turboq_roll"]["byte_perplexity,none"] == pytest.approx(due, rel=1e-4)
    # A context that does not fit loses its beginning, and says so.
    short = TurboqLM(pretrained=str(GOLDEN), codec="f32", max_length=4)
    with pytest.warns(TurboqWarning, match="loses its first 5 of 8 tokens"):
        ((got, _),) = short._loglikelihood_tokens([(None, list(range(8)), [7, 9])])
    assert got == pytest.approx(logp([5, 6, 7], [7, 9]), abs=1e-4)
    with pytest.raises(TurboqError, match="continuation of 6 tokens does not fit max_length=4"):
        short._loglikelihood_tokens([(None, [1], [1] * 6)])
    with pytest.raises(TurboqError, match="give one of them"):
        TurboqLM(pretrained=str(GOLDEN), codec="f32", plan="x")
