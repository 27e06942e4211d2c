# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Writing the file of expert load: one row at every log, at the same price however many there are.

Under its name there is a whole safetensors file at every moment, for other processes that read it and after a kill at any
point. A safetensors header has to say how long each tensor is, so a row cannot be added in one atomic write. Therefore there
are two files, and they change places at every row:

    expert_load.safetensors    has all rows; nobody writes to it
    _expert_load.spare         lacks the last one; gets it and the new row, then its header, then the other's name

Rows never change once they are written, so whoever has mapped the file may go on reading it. In front of the rows there is
`_reserved_step`, unused space for the steps to come; `finish` leaves it out and removes the second file.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hf_moe.expert_load import LOAD_FILE, LOAD_FORMAT, ExpertLoad, open_expert_load, read_expert_load

__all__ = ["LOAD_FILE", "ExpertLoad", "ExpertLoadFile", "read_expert_load"]

_Part = tuple[np.ndarray, np.ndarray]  # some rows: steps_N and executed_NLE

logger = logging.getLogger(__name__)

RESERVED_STEPS = 2**17  # 1 MB, most of it a hole in the file
_ALL = 2**63 - 1
_CHUNK = 2**20  # bytes of rows that are copied at a time


class ExpertLoadFile:
    """The file of expert load of one training. Only one process may write to it.

    Args:
        path: the file.
        layers: the decoder layer of each MoE layer.
        num_experts: the number of experts of each.

    Raises:
        ValueError: there are no layers, or not as many as `num_experts`.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import load_file
        >>> path = tempfile.mkdtemp() + "/expert_load.safetensors"
        >>> file = ExpertLoadFile(path, layers=[0, 2], num_experts=[2, 3])
        >>> file.append(10, [[6, 2], [5, 1, 2]])
        >>> file.append(20, [[4, 4], [3, 3, 2]])
        >>> load_file(path)["executed"].sum(axis=0).tolist()
        [[10, 6, 0], [8, 4, 4]]
        >>> file.finish()
    """

    def __init__(self, path: str | os.PathLike[str], layers: Sequence[int], num_experts: Sequence[int]) -> None:
        if not layers or len(layers) != len(num_experts) or min(num_experts) < 1:
            raise ValueError(
                f"`layers`={list(layers)} and `num_experts`={list(num_experts)} must have one number for each MoE layer, and "
                "every layer an expert."
            )
        self.path = Path(path)
        # `Trainer` uploads no file whose name begins with an underscore
        self._new, self._aside, self._spare_path = (
            self.path.with_name(f"_{self.path.stem}.{ending}") for ending in ("new", "aside", "spare")
        )
        self._layers, self._num_experts = [int(layer) for layer in layers], [int(count) for count in num_experts]
        self._current: _Rows | None = None
        self._spare: _Rows | None = None

    def keep(self, up_to_step: int) -> None:
        """Begin: keep the rows up to a step, and drop those that this training will write again; at step 0 all of them.

        At step 0 a file of other layers or experts is replaced; one that is no file of expert load is renamed first, to
        `….old`.

        Raises:
            ValueError: the file is none of expert load, or of other layers or experts, and `up_to_step` is not 0.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        self._current = self._spare = None
        with self._existing(up_to_step) as (count, parts):
            rows = _Rows(self._new, self._layers, self._num_experts, room=_room(count))
            rows.extend(parts)
        rows.rename(self.path)
        self._current = rows
        self._spare = self._copy(rows)

    def append(self, step: int, executed: Sequence[Sequence[int]]) -> None:
        """Add a row. The file that is there is continued if `keep` was not called.

        Args:
            step: the optimizer step, later than the last row's.
            executed: of each MoE layer, the assignments of each of its experts since the row before.

        Raises:
            ValueError: the row does not fit; the file is as it was.
            OSError: it cannot be written (a full disk); the file is whole, with or without the row.
        """
        if self._current is None:
            self.keep(up_to_step=_ALL)
        assert self._current is not None
        row = self._row(step, executed)
        spare, self._spare = self._spare, None  # is made anew if anything goes wrong
        if spare is None or spare.room <= self._current.count:
            spare = self._copy(self._current)
        spare.extend(itertools.chain(self._current.read(spare.count), [row]))
        self._swap(spare)

    def finish(self) -> None:
        """End: leave `step` and `executed` alone in the file, and no other file beside it."""
        if self._current is None:
            return
        rows = _Rows(self._new, self._layers, self._num_experts, room=self._current.count)
        rows.extend(self._current.read(0))
        rows.rename(self.path)
        self._current = self._spare = None
        self._recover()

    def _copy(self, rows: _Rows) -> _Rows:
        """A spare file with the same rows, and space for more."""
        spare = _Rows(self._spare_path, self._layers, self._num_experts, room=_room(rows.count))
        spare.extend(rows.read(0))
        return spare

    def _row(self, step: int, executed: Sequence[Sequence[int]]) -> _Part:
        assert self._current is not None
        if step <= self._current.last_step:
            raise ValueError(f"`step`={step} must be later than {self._current.last_step}, the last row of {self.path}.")
        numbers = [len(counts) for counts in executed]
        if numbers != self._num_experts:
            raise ValueError(f"`executed` has layers of {numbers} experts, but {self.path} is of {self._num_experts}.")
        most, flat = max(self._num_experts), array("q")
        for counts in executed:
            flat.fromlist([*counts, *[0] * (most - len(counts))])  # refuses fractions, which numpy would cut off
        executed_NLE = np.array(flat).reshape(1, -1, most)
        if executed_NLE.min() < 0:
            raise ValueError(f"`executed` has a negative count at step {step}.")
        return np.array([step], "<i8"), executed_NLE

    @contextmanager
    def _existing(self, up_to_step: int) -> Iterator[tuple[int, Iterator[_Part]]]:
        """How many rows of the file that is there are kept, and these rows."""
        if up_to_step <= 0:
            self._save_what_is_not_ours()
        if up_to_step <= 0 or not self.path.exists():
            yield 0, iter(())
            return
        with open_expert_load(self.path) as (file, layers, num_experts):
            if (layers, num_experts) != (self._layers, self._num_experts):
                raise ValueError(
                    f"{self.path} is of layers {layers} with {num_experts} experts, but the model has {self._layers} with "
                    f"{self._num_experts}. Move the file away, or give another `output_dir`."
                )
            steps_N, executed_NLE = file.get_tensor("step"), file.get_slice("executed")
            count = int(np.searchsorted(steps_N, up_to_step, side="right"))
            pieces = _pieces(0, count, 8 * len(layers) * max(num_experts))
            yield count, ((steps_N[first:last], executed_NLE[first:last]) for first, last in pieces)

    def _save_what_is_not_ours(self) -> None:
        try:
            with open_expert_load(self.path):
                return
        except FileNotFoundError:
            return
        except ValueError:
            name = self.path.name
            old = next(path for i in itertools.count() if not (path := self.path.with_name(f"{name}.old{i or ''}")).exists())
            logger.warning("%s is no file of expert load; it is kept as %s.", self.path, old.name)
            os.replace(self.path, old)

    def _swap(self, spare: _Rows) -> None:
        """Let the spare file and the current one change names. A kill leaves the name on one of the two."""
        assert self._current is not None
        last = self._current
        try:
            os.link(self.path, self._aside)
        except OSError:  # no hard links here (FAT, some network drives): for a moment nothing has the name
            os.replace(self.path, self._aside)
        last.path = self._aside
        spare.rename(self.path)
        self._current = spare
        last.rename(self._spare_path)
        self._spare = last

    def _recover(self) -> None:
        """Put back what a kill left without its name, and remove what it left beside the file."""
        if self._aside.exists() and not self.path.exists():
            os.replace(self._aside, self.path)
        for path in (self._aside, self._spare_path, self._new):
            path.unlink(missing_ok=True)


class _Rows:
    """A new file that rows are added to. It is a whole safetensors file after each `extend`.

    Attributes:
        path: where it is.
        count: its rows.
        room: how many rows it has space for.
        last_step: the step of the last one, or 0.
    """

    def __init__(self, path: Path, layers: list[int], num_experts: list[int], room: int) -> None:
        self.path, self.count, self.last_step = path, 0, 0
        self.room, self._shape = room, (len(layers), max(num_experts))
        self._metadata = {"format": LOAD_FORMAT, "layers": json.dumps(layers), "num_experts": json.dumps(num_experts)}
        self._data = 8 + -(-len(self._header(2**62)) // 8) * 8  # where it begins: numbers may grow up to 2**62
        with open(path, "wb") as file:
            file.truncate(self._data + 8 * room)

    @property
    def _row_bytes(self) -> int:
        return 8 * self._shape[0] * self._shape[1]

    def extend(self, parts: Iterable[_Part]) -> None:
        """Add rows."""
        count, last_step = self.count, self.last_step
        with open(self.path, "r+b") as file:
            for steps_N, executed_NLE in parts:
                file.seek(self._data + 8 * count)
                file.write(steps_N.astype("<i8").tobytes())
                file.seek(self._data + 8 * self.room + count * self._row_bytes)
                file.write(executed_NLE.astype("<i8").tobytes())
                count, last_step = count + len(steps_N), int(steps_N[-1])
            file.seek(0)
            file.write((self._data - 8).to_bytes(8, "little") + self._header(count).ljust(self._data - 8))
        self.count, self.last_step = count, last_step

    def read(self, first: int) -> Iterator[_Part]:
        """The rows from one on."""
        with open(self.path, "rb") as file:
            for start, stop in _pieces(first, self.count, self._row_bytes):
                file.seek(self._data + 8 * start)
                steps_N = np.frombuffer(file.read(8 * (stop - start)), "<i8")
                file.seek(self._data + 8 * self.room + start * self._row_bytes)
                executed_NLE = np.frombuffer(file.read((stop - start) * self._row_bytes), "<i8")
                yield steps_N, executed_NLE.reshape(-1, *self._shape)

    def rename(self, path: Path) -> None:
        os.replace(self.path, path)
        self.path = path

    def _header(self, count: int) -> bytes:
        shapes = {"step": (count,), "_reserved_step": (self.room - count,), "executed": (count, *self._shape)}
        header: dict[str, object] = {"__metadata__": self._metadata}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 8 * math.prod(shape)
            if name != "_reserved_step" or shape != (0,):
                header[name] = {"dtype": "I64", "shape": shape, "data_offsets": [start, end]}
        return json.dumps(header, separators=(",", ":")).encode()


def _pieces(first: int, last: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """From `first` to `last` in pieces that take little memory."""
    size = max(1, _CHUNK // row_bytes)
    for start in range(first, last, size):
        yield start, min(start + size, last)


def _room(count: int) -> int:
    return max(RESERVED_STEPS, 4 * count)
