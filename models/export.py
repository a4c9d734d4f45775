"""Write a trained model as a GGUF file with a profile.

    python models/export.py RUN OUT.gguf [--type q8_0]

RUN is the folder that train.py wrote to. `razor-local convert` measures the heads. The window
depends on the length of the training texts, because the paper's 4,000 tokens are as long as these
texts and nothing would be folded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from data import CHAT_TEMPLATE, SPECIALS
from gguf.quants import quantize
from model import Shape
from train import load

WINDOW_DIVISOR = 8
STILL = 1e20  # llama.cpp divides the frequency of a pair by this
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
NAMES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def pairs_together(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder rows of q or k for llama.cpp's RoPE, which rotates neighbors instead of halves."""
    rows, columns = weight.shape
    halves = weight.reshape(n_head, 2, rows // n_head // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def tensors(state: dict[str, torch.Tensor], shape: Shape) -> dict[str, np.ndarray]:
    """Return the float32 arrays by their names in the GGUF."""
    weights = {name: value.float().cpu().numpy() for name, value in state.items()}
    out = {
        "token_embd.weight": weights["embed.weight"],
        "output_norm.weight": weights["norm.weight"],
        "output.weight": weights["head.weight"],
        "rope_freqs.weight": np.repeat(np.float32([1, STILL]), shape.head_dim // 4),
    }
    for layer in range(shape.n_layer):
        for ours, theirs in NAMES.items():
            weight = weights[f"blocks.{layer}.{ours}.weight"]
            if ours in ("q", "k"):
                weight = pairs_together(weight, shape.n_head if ours == "q" else shape.n_head_kv)
            out[f"blk.{layer}.{theirs}.weight"] = weight
    return out


def write_gguf(run: dict, tokenizer: dict, out: Path, type_name: str, name: str) -> None:
    """Write the GGUF. run: the content of model/ from train.py; tokenizer: the parsed JSON."""
    shape = Shape(**run["shape"])
    kind, file_type = TYPES[type_name]
    n_parameters = sum(value.numel() for value in run["model"].values())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_license("MIT")
    writer.add_size_label(f"{n_parameters / 1e6:.1f}M")
    writer.add_description(
        f"Answers questions about facts hidden in a text of up to {run['length']:,} tokens,"
        " trained for razor_local on public-domain books."
    )
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(run["length"])
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    add_tokenizer(writer, tokenizer, shape.n_vocab)
    for name, data in tensors(run["model"], shape).items():
        if data.ndim == 2 and type_name != "f32":
            writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, n_vocab: int) -> None:
    ids = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    if len(tokens) != n_vocab or [ids[t] for t in tokens] != list(range(n_vocab)):
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, the model {n_vocab}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in SPECIALS else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges(merges)
    end, _, turn_end = (ids[t] for t in SPECIALS)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(turn_end)
    writer.add_eot_token_id(turn_end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def convert(model: Path, out: Path) -> None:
    """Add a profile with the heads that razor-local chooses and a window of 1/8 of the context."""
    command = [str(Path(sys.executable).with_name("razor-local")), "convert", str(model)]
    command += ["-o", str(out), "--force", "--window-min", "256"]
    subprocess.run([*command, "--window-divisor", str(WINDOW_DIVISOR)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished training")
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q8_0", help="of the matrices")
    parser.add_argument("--name", default="razor-default")
    args = parser.parse_args()
    run = load(args.run / "model")
    tokenizer = json.loads((args.run / "tokenizer.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "model.gguf"
        write_gguf(run, tokenizer, bare, args.type, args.name)
        convert(bare, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
