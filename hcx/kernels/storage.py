"""What the weight files hold for an entry of `quantization_config.modules`, before any of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hcx.errors import KernelError
from hcx.kernels.format import SCALE_DTYPES


def stored_tensors(entry: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name after the stem -> shape and type, of every tensor of a weight.

    Raises:
        KernelError: the entry lacks something.
    """
    try:
        return _stored_tensors(entry)
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise KernelError(f"quantization_config: a module's entry is damaged ({error!r})") from None


def _stored_tensors(entry: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    bits, rows, columns = int(entry["bits"]), int(entry["out_features"]), int(entry["in_features"])
    groups, row_bytes = -(-columns // int(entry["group_size"])), -(-columns // 8)
    dtype = next(dtype for dtype, name in SCALE_DTYPES.items() if name == entry["scale_dtype"])
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "planes": ((bits, rows, row_bytes), torch.uint8),
        "scales": ((bits, rows, groups), dtype),
    }
    if entry.get("offset"):
        found["offset"] = ((rows, groups), torch.float32)
    for width in list(entry.get("widths") or [])[:-1]:
        # Narrower widths are read too, so that no tensor of the files is left over.
        found[f"scales_{width}"] = ((width, rows, groups), dtype)
        if entry.get("offset"):
            found[f"offset_{width}"] = ((rows, groups), torch.float32)
    if entry.get("row_segments"):
        runs = sum(int(run["rows"]) * int(run["bits"]) for run in entry["row_segments"])
        found["planes"], found["scales"] = ((runs * row_bytes,), torch.uint8), ((runs * groups,), dtype)
    if entry.get("row_order"):
        found["row_order"] = ((rows,), torch.int32)
    if entry.get("mask"):
        found["mask"] = (((int(entry["mask_bytes"]),) if entry.get("mask_bytes") else (rows, row_bytes)), torch.uint8)
    encoding = entry.get("encoding")
    if encoding:
        if not entry.get("mask"):
            raise KernelError(
                f"the option 'encoding' = {encoding.get('kind')!r} is not supported here; convert it first"
            )
        del found["planes"]
        n_in, n_out, n_s = (int(encoding[key]) for key in ("n_in", "n_out", "n_s"))
        stream = 8 * (rows * row_bytes if encoding["traversal"] == "rows" else 8 * row_bytes * -(-rows // 8))
        blocks = -(-stream // n_out)
        found["codes"] = ((bits, -(-blocks * n_in // 8)), torch.uint8)
        found["corrections"] = ((sum(int(length) for length in encoding["correction_bytes"]),), torch.uint8)
        found["network"] = (((n_s + 1) * n_out * -(-n_in // 8),), torch.uint8)
    return found
