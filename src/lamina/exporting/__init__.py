"""Writing what is in a `.lamina` file for programs that do not know Lamina."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamina import artifact
from lamina.errors import FileError
from lamina.exporting.folders import write_dense_folder, write_small_folder
from lamina.exporting.onnx_file import Written, write_onnx
from lamina.network.small_folders import small_file

__all__ = ["FORMATS", "Written", "export", "write_dense_folder", "write_onnx", "write_small_folder"]
FORMATS = ("safetensors", "pt", "hf", "lamina-hf", "onnx")
MEANT_FOR = {"like": ("hf", "lamina-hf"), "skeleton": ("onnx",), "int8": ("onnx",),
             "tolerance": ("onnx",)}  # fmt: skip


def export(
    file: str | Path, out: str | Path, to: str = "safetensors", *, like: str | Path | None = None,
    skeleton: Any = None, int8: bool | None = None, tolerance: float | None = None,
) -> str:  # fmt: skip
    """Write a `.lamina` file in another format, whole or not at all; return what to say of it.

    Args:
        file: the `.lamina` file, or a folder that keeps one (`--to lamina-hf`).
        out: the file to write; of `hf` and `lamina-hf` the folder, which is new or empty.
        to: `"safetensors"` or `"pt"` (dense tensors by the names of the compressed network), `"hf"`
            (a folder that transformers opens without Lamina), `"lamina-hf"` (a folder that keeps
            the small file and opens after `import lamina.hf`), `"onnx"`.
        like: of folders: the original one, whose tokenizer and other small files are copied.
        skeleton: of onnx: see `lamina.opening.open_model`, for a network of one's own.
        int8, tolerance: of onnx: see `write_onnx`.

    Raises:
        FileError: the file is damaged, or the format is unknown or does not take what was given.
        NetworkError: the network has no such form.
        RunError: it cannot be written.
        MissingExtraError: what the format needs is not installed.
    """
    if to not in FORMATS:
        why = f"there are {', '.join(FORMATS)}"
        raise FileError("cannot export", f"--to {to}", why)
    given = {"like": like, "skeleton": skeleton, "int8": int8, "tolerance": tolerance}
    for name, value in given.items():
        if value is not None and to not in MEANT_FOR[name]:
            why = f"it is for --to {' and '.join(MEANT_FOR[name])}"
            raise FileError(f"--{name} has no meaning here", f"--to {to}", why, "leave it out")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise FileError("cannot read the tolerance", str(tolerance), "it is a positive number")
    given_file, file = Path(file), small_file(file) or file
    if like is None and to in MEANT_FOR["like"] and given_file.is_dir():
        like = given_file  # what lies in the folder besides belongs to the model
    if to in ("safetensors", "pt"):
        return artifact.summary(artifact.decompress(file, out, to), out)
    if to == "onnx":
        from lamina.opening import open_model

        return write_onnx(
            open_model(given_file, skeleton=skeleton), out, int8=int8, tolerance=tolerance
        ).line()
    package = artifact.read(file)
    if to == "hf":
        write_dense_folder(package, out, like)
        integer = sum(edit.form in ("int8", "bf16") for edit in package.edits)
        said = f"; {integer} layers of int8 or bf16 multiply wider floats there"
        return f"folder   {out}: from_pretrained opens it{said if integer else ''}"
    write_small_folder(package, file, out, like)
    return f"folder   {out}: from_pretrained opens it after `import lamina.hf`"
