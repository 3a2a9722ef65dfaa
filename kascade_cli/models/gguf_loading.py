"""Load a GGUF file through transformers: config, weights (dequantised) and tokenizer, all from the one file."""

import contextlib
import functools
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kascade_cli.errors import KascadeError, require_extra
from kascade_cli.models.gguf_config import complete_config
from kascade_cli.models.gguf_file import GgufHeader

_ARRAY, _STRING = 9, 8
_SHORT = 4096  # elements of an array that may be of use: counts per layer, say
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)
_reading = threading.Lock()


def gguf_config(header: GgufHeader, name: str) -> Any:
    """The config of a GGUF file. Raises KascadeError if transformers lacks its architecture."""
    from transformers import AutoConfig

    with _quick_reading(header, show=False):
        try:
            config = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name)
        except _FAILURES as error:
            raise KascadeError(_problem(error, header, name)) from error
    return complete_config(config, header, name)


def gguf_dtype(header: GgufHeader, where: Any, target: torch.device | None) -> str:
    """What `auto` is: the file's own type, or, of quantised weights, float32 on a CPU and bfloat16 on a GPU.

    `where` and `target` are those of placement.placement.
    """
    if header.float_type is not None:
        return header.float_type
    on_cpu = not torch.cuda.is_available() if where == "auto" else where is None and target.type == "cpu"
    return "float32" if on_cpu else "bfloat16"


def load_gguf(header: GgufHeader, config: Any, name: str, *, show: bool, **options: Any) -> tuple[Any, Any, dict]:
    """(model, tokenizer, transformers' loading info); `options` are from_pretrained's.

    With `show`, transformers' progress bar is drawn where stderr is a terminal.
    """
    from transformers import AutoModelForCausalLM

    require_extra("accelerate", "gguf")
    with contextlib.suppress(ImportError):  # releases without it always dequantise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    with _quick_reading(header, show=show):
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                header.path.parent, gguf_file=header.path.name, config=config, output_loading_info=True, **options
            )
        except _FAILURES as error:
            raise KascadeError(_problem(error, header, name)) from error
    return model, gguf_tokenizer(header, name), found


def gguf_tokenizer(header: GgufHeader, name: str) -> Any:
    """The tokenizer of a GGUF file, chat template included."""
    from transformers import AutoTokenizer, tokenization_utils_tokenizers

    # Releases up to 5.17 make the tokenizer of what the quick reader passes over.
    old = hasattr(tokenization_utils_tokenizers, "load_gguf_checkpoint")
    with contextlib.nullcontext() if old else _quick_reading(header, show=False):
        try:
            return AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
        except _FAILURES as error:
            raise KascadeError(_problem(error, header, name)) from error


def loaded_from(header: GgufHeader) -> str:
    """`, dequantised from Q4_K`; of unquantised weights nothing."""
    return f", dequantised from {header.quantization}" if header.quantization else ""


def _problem(error: Exception, header: GgufHeader, name: str) -> str:
    from transformers import __version__

    text = " ".join(str(error).split())
    if "not supported yet" in text or "Unrecognized" in text or "nknown gguf" in text:
        return f"{name}: a GGUF of architecture '{header.architecture}', which transformers {__version__} cannot read"
    if isinstance(error, KeyError):
        text = f"its metadata lacks {text}"
    return f"cannot load {name}: {text[:300] or type(error).__name__}"


@contextlib.contextmanager
def _quick_reading(header: GgufHeader, show: bool) -> Iterator[None]:
    """While it lasts, gguf's reader passes over the vocabulary, and dequantising draws no bar unless `show`.

    transformers opens a file three times with that reader, which walks every token and merge in Python (18 s each of
    152k tokens), and uses nothing of them: it takes the tokenizer from a reader of its own. It also makes the same
    table of names for every module of the model.
    """
    from transformers import modeling_gguf_pytorch_utils as legacy

    gguf = require_extra("gguf", "gguf")

    from gguf.gguf_reader import ReaderField

    key, tokens = f"{header.architecture}.vocab_size", header.metadata.get("tokenizer.ggml.tokens")

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int, *rest: Any) -> Any:
            if raw_type == _ARRAY:
                data = memoryview(self.data)
                kind, count = struct.unpack_from("<IQ", data, orig_offs)
                if kind == _STRING or count > _SHORT:
                    size = _size(data, orig_offs + 12, kind, count)
                    if size is not None:
                        types = [gguf.GGUFValueType(_ARRAY), gguf.GGUFValueType(kind)]
                        return size + 12, [self.data[orig_offs : orig_offs + 12]], [], types
            return super()._get_field_parts(orig_offs, raw_type, *rest)

        def _build_fields(self, offs: int, *rest: Any) -> int:
            """Says how many tokens there are, as newer files do themselves."""
            end = super()._build_fields(offs, *rest)
            if key not in self.fields and isinstance(tokens, int):
                kind = [gguf.GGUFValueType.UINT32]
                self.fields[key] = ReaderField(offs, key, [np.array([tokens], np.uint32)], [0], kind)
            return end

    with _reading, contextlib.ExitStack() as stack:
        stack.callback(setattr, gguf, "GGUFReader", gguf.GGUFReader)
        gguf.GGUFReader = Reader
        stack.callback(setattr, gguf, "get_tensor_name_map", gguf.get_tensor_name_map)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        stack.callback(setattr, legacy, "tqdm", legacy.tqdm)
        legacy.tqdm = functools.partial(legacy.tqdm, disable=None if show else True)
        yield


def _size(data: memoryview, start: int, kind: int, count: int) -> int | None:
    """Bytes of an array's elements, None for a type that is not known."""
    widths = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
    if kind in widths:
        return widths[kind] * count
    if kind != _STRING:
        return None
    end, length = start, struct.Struct("<Q")
    for _ in range(count):
        end += 8 + length.unpack_from(data, end)[0]
    return end - start
