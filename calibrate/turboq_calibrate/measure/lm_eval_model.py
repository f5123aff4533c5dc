"""A quantized cache as a model of EleutherAI's lm-evaluation-harness (extra `eval`, lm_eval 0.4).

    python -m turboq_calibrate.measure.lm_eval_model --model turboq \\
        --model_args pretrained=MODEL,plan=runs/learned --tasks gsm8k --batch_size 8

Model arguments: pretrained (folder, name on the hub, .gguf, or embedded), plan (a folder), or codec
(such as turboquant_mse:3; by default exact), max_length, max_gen_toks, dtype. `--device`, which the
harness always sets, says nothing here: JAX takes JAX_PLATFORMS. Every token that is
scored or generated has been written to the packed cache and is read from it. What is longer than
the context loses its beginning, as in the harness's own models, and a warning says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from turboq import words
from turboq.errors import TurboqError, TurboqWarning
from turboq.plan import check_model, load
from turboq_calibrate.cli.common import template
from turboq_calibrate.fit.plan import make_plan
from turboq_calibrate.measure.generate_many import Sampling, cut, generate, stops_at
from turboq_calibrate.measure.likelihood import log_likelihoods
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

_HANDLED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@register_model("turboq")
class TurboqLM(TemplateLM):
    """loglikelihood, loglikelihood_rolling and generate_until through a packed cache.

    Raises:
      TurboqError: plan and codec together, a plan of another model, a max_length beyond the
        model's context, a model whose tokenizer names no end token.
    """

    def __init__(
        self, pretrained: str = "embedded", plan: str | None = None, codec: str | None = None,
        max_length: int | None = None, max_gen_toks: int = 256, dtype: str = "float32",
        batch_size: int | str = 8, max_batch_size: int | None = None, device: str | None = None,
    ):  # fmt: skip
        super().__init__()
        if plan is not None and codec is not None:
            raise TurboqError(f"plan={plan} and codec={codec}: give one of them")
        if not str(batch_size).isdecimal():
            raise TurboqError(f"batch_size={batch_size!r} must be a number")
        self.name = pretrained
        self.model = load_model(pretrained, dtype=dtype)
        geometry = model_geometry(self.model)
        if plan is not None:
            found, arrays = load(plan)
            check_model(found, geometry)
        else:
            word = words.parse(codec or "exact")
            found, arrays = make_plan(
                geometry, k=template(word.k, "k", geometry), v=template(word.v, "v", geometry)
            )
        self.layers = found.kv_layers(arrays)
        self.max_length = max_length or self.model.spec.context
        self.model.spec.check_length(self.max_length, f"max_length={max_length}:")
        self.max_gen_toks, self.batch = max_gen_toks, int(batch_size)
        self.tokens = self.model.tokenizer
        if not self.tokens.eos_ids:
            raise TurboqError(f"model {pretrained} names no end token (eos_token_id)")

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What empty contexts begin with."""
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, of which the harness keeps a hash."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._template.render(chat_history, answer=add_generation_prompt)

    @property
    def _template(self):
        if self.tokens.chat is None:
            raise TurboqError(f"model {self.name} has no chat template: leave it out")
        return self.tokens.chat

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """BOS in front where the tokenizer puts it, once."""
        ids = self.tokens.encode(string)
        bos = self.tokens.bos_id
        add = self.tokens.adds_bos if add_special_tokens is None else add_special_tokens
        if not add or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False, **kwargs: Any,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        pairs = []
        for _, context, continuation in requests:
            # The last token is written by nobody: it may be one beyond.
            left = max(0, len(context) + len(continuation) - 1 - self.max_length)
            if left >= len(context):
                raise TurboqError(
                    f"a continuation of {len(continuation)} tokens does not fit max_length="
                    f"{self.max_length}"
                )
            pairs.append((self._shortened(context, left), continuation))
        found = log_likelihoods(self.model, self.layers, pairs, batch=self.batch)
        for (texts, *_), result in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        pairs, owner = [], []
        for n, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                pairs.append((None, *make_disjoint_window(window)))
                owner.append(n)
        total = [0.0] * len(requests)
        for n, (logp, _) in zip(owner, self._loglikelihood_tokens(pairs), strict=True):
            total[n] += logp
        for request, logp in zip(requests, total, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return total

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        answers = [""] * len(requests)
        for members in groups.values():
            how: dict[str, Any] = dict(
                normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            )
            if odd := sorted(set(how) - _HANDLED):
                raise TurboqError(f"generation setting {odd[0]}={how[odd[0]]!r} is not supported")
            room = self.max_length - how["max_gen_toks"]
            if room < 1:
                raise TurboqError(
                    f"max_gen_toks={how['max_gen_toks']} leaves no prompt of max_length="
                    f"{self.max_length}"
                )
            prompts = [self.tok_encode(requests[n].args[0]) for n in members]
            found = generate(
                self.model, [self._shortened(p, max(0, len(p) - room)) for p in prompts],
                how["max_gen_toks"], layers=self.layers, progress=False,
                sampling=Sampling(
                    temperature=how.get("temperature", 1.0) if how["do_sample"] else 0.0,
                    top_p=how.get("top_p", 1.0),
                ),
                stop_ids=self.tokens.eos_ids, stop=stops_at(self.tokens, how["until"]),
                batch=self.batch,
            )  # fmt: skip
            for n, tokens in zip(members, found.tokens, strict=True):
                answers[n] = cut(self.tokens.decode(tokens, skip_special=True), how["until"])
                self.cache_hook.add_partial("generate_until", requests[n].args, answers[n])
        return answers

    def _shortened(self, ids: list[int], left: int) -> list[int]:
        if left:
            warnings.warn(
                f"a prompt loses its first {left} of {len(ids)} tokens: it does not fit "
                f"max_length={self.max_length}",
                TurboqWarning,
                stacklevel=2,
            )
        return ids[left:]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
