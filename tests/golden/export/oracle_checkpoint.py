"""A tiny random Llama that every engine can take: python oracle_checkpoint.py WORK

Head dim 32, so that groups of 32 fit; no two of its sizes are equal, because the ONNX builder finds
the LM head by shape.
"""

import shutil
import sys
from pathlib import Path

import torch
import transformers

TOKENIZER = Path(__file__).resolve().parents[1] / "llama3" / "tokenizer.json"


def main(work: Path) -> None:
    torch.manual_seed(20261122)
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=320,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.normal_(0, 0.15)
    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(__import__("json").dumps(kind))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
