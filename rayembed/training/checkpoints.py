"""What DeepSpeed's ZeRO saved on one number of workers, read for another; knows its files, not DeepSpeed itself.

Each worker's file holds its share of the optimiser in flat tensors, one parameter after the other. DeepSpeed loads them
on the same number of workers alone, or after a conversion of the whole checkpoint into a file per weight and moment.
Here each worker maps the files of all, and takes from them what its own share is made of.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayembed.config.wording import counted
from rayembed.models.pickles import tensors_alone

FOLDER = "state"
WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
_NAMES = {  # by stage: of the optimiser's state and of its float32 weights in a worker's share
    1: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    2: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    3: ("optimizer_state_dict", "fp32_flat_groups"),
}


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's values, flattened, and where it lies in a flat tensor."""

    name: str
    start: int
    """Its first value within the parameter."""

    numel: int
    offset: int
    """Its first value within the flat tensor."""


@dataclass(frozen=True)
class Flat:
    """One flat tensor of a worker."""

    numel: int
    """With padding."""

    pieces: tuple[Piece, ...]


class Saved:
    """A checkpoint of ZeRO 1 to 3, by parameter."""

    def __init__(self, folder: Path) -> None:
        """Opens the folder that Engine.save wrote.

        Raises:
            FileNotFoundError: it holds no checkpoint, or not the files of all workers that wrote it.
        """
        self._folder = folder / FOLDER
        found = sorted(self._folder.glob("*mp_rank_00_model_states.pt"))  # of worker 0, of ZeRO 3 also of the others
        if not found:
            raise FileNotFoundError(f"{folder} holds no DeepSpeed checkpoint (no model states in its folder {FOLDER})")
        self.model: dict[str, Any] = _mapped(min(found, key=lambda path: (len(path.name), path.name)))
        """Trained weights (none of ZeRO 3), buffers, schedule, counters."""

        self.num_workers = int(self.model["dp_world_size"])

    def check_pickles(self) -> None:
        """Refuses a checkpoint that holds more than DeepSpeed writes, before DeepSpeed reads it and runs what is there.

        Raises:
            ValueError: names the file, and what it would run.
        """
        for path in sorted(self._folder.glob("*.pt")):
            rank = re.match(r"(?:\w+_)?zero_pp_rank_(\d+)_", path.name)
            if rank is None or int(rank[1]) < self.num_workers:  # others were left by a run of more workers
                _mapped(path)

    @cached_property
    def shares(self) -> list[dict[str, Any]]:
        """Each worker's share of the optimiser, in the order of ranks."""
        found: list[dict[str, Any]] = []
        for rank in range(self.num_workers):  # there may be more files, left by a run of more workers that was killed
            paths = [*self._folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")]
            if len(paths) != 1:
                raise FileNotFoundError(
                    f"{self._folder} was written by {counted(self.num_workers, 'worker')}, and the file of worker "
                    f"{rank} is not there; restore it, or train anew with --overwrite"
                )
            found.append(_mapped(paths[0])["optimizer_state_dict"])
        return found

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return int(self.shares[0]["zero_stage"])

    def share_of(self, layout: Sequence[Flat], groups: Sequence[int]) -> dict[str, Any]:
        """What DeepSpeed would have saved of a worker whose flat tensors are these.

        Args:
            layout: this worker's flat tensors.
            groups: number of the optimiser's group that each is of.

        Raises:
            ValueError: DeepSpeed's settings laid the values out in a way that is not read here.
        """
        state = self._states[0]
        step = next(iter(state["state"].values()))["step"]
        made = {
            "state": {
                number: {"step": step.clone(), **{key: self.cut(flat, key) for key in MOMENTS}}
                for number, flat in enumerate(layout)
            },
            "param_groups": [
                {**found, "params": [number for number, own in enumerate(groups) if own == group]}
                for group, found in enumerate(state["param_groups"])
            ],
        }
        of_optimizer, of_weights = _NAMES[self.stage]
        return {**self.shares[0], of_optimizer: made, of_weights: [self.cut(flat, WEIGHT) for flat in layout]}

    def cut(self, flat: Flat, key: str) -> Tensor:
        """A flat tensor of another number of workers, in float32; padding is 0.

        Args:
            flat: what it is made of.
            key: WEIGHT or one of MOMENTS.
        """
        made = torch.zeros(flat.numel)
        for piece in flat.pieces:
            for rank, number, found in self._pieces[piece.name]:
                first, last = max(piece.start, found.start), min(piece.start + piece.numel, found.start + found.numel)
                if first < last:
                    values = self._flats(rank, key)[number][found.offset + first - found.start :][: last - first]
                    made[piece.offset + first - piece.start :][: last - first] = values
        return made

    @cached_property
    def _states(self) -> list[dict[str, Any]]:
        states = [share[_NAMES[self.stage][0]] for share in self.shares]
        if not all(isinstance(state, dict) for state in states) or any(
            any(found) for found in self.shares[0].get("param_alignment_paddings", [])
        ):
            raise ValueError(
                f"{self._folder} was written with zero_optimization.elastic_checkpoint or parameter_alignment; "
                f"only as many workers as wrote it can go on with it; set ray.num_workers to {self.num_workers}"
            )
        if any(MOMENTS[0] not in found for found in states[0]["state"].values()):
            raise ValueError(
                f"{self._folder} has moments in 8 bits (train.optim: adamw_bnb_8bit), scaled by the block, and blocks "
                f"cannot be cut for another number of workers; set ray.num_workers to {self.num_workers}"
            )
        return states

    def _flats(self, rank: int, key: str) -> Sequence[Tensor]:
        if key == WEIGHT:
            flats: Sequence[Tensor] = self.shares[rank][_NAMES[self.stage][1]]
            return flats
        state = self._states[rank]
        return [state["state"][number][key] for group in state["param_groups"] for number in group["params"]]

    @cached_property
    def _pieces(self) -> dict[str, list[tuple[int, int, Piece]]]:
        """By parameter: worker, number of the flat tensor, and the piece, from the first to the last."""
        return self._of_stage_3() if self.stage == 3 else self._of_stages_1_and_2()

    def _of_stages_1_and_2(self) -> dict[str, list[tuple[int, int, Piece]]]:
        """All parameters of a group one after the other, cut into equal parts."""
        pieces: dict[str, list[tuple[int, int, Piece]]] = {}
        for rank, share in enumerate(self.shares):
            for number, group in enumerate(share["param_slice_mappings"]):
                for name, place in group.items():
                    before = pieces.setdefault(name, [])
                    start = sum(piece.numel for _, _, piece in before)
                    before.append((rank, number, Piece(name, start, place.numel, place.start)))
        return pieces

    def _of_stage_3(self) -> dict[str, list[tuple[int, int, Piece]]]:
        """Each parameter cut into equal parts, the last one padded; a worker's parts one after the other."""
        pieces: dict[str, list[tuple[int, int, Piece]]] = {}
        sizes = [flat.numel() for flat in self._flats(0, WEIGHT)]
        number = offset = 0
        for name, shape in (item for group in self.model["param_shapes"] for item in group.items()):
            total = torch.Size(shape).numel()
            part = -(-total // self.num_workers)
            while offset == sizes[number]:
                number, offset = number + 1, 0
            pieces[name] = [
                (rank, number, Piece(name, rank * part, min(part, total - rank * part), offset))
                for rank in range(self.num_workers)
                if rank * part < total
            ]
            offset += part
        assert (number, offset) == (len(sizes) - 1, sizes[-1]), "all of a worker's share belongs to a parameter"
        return pieces


def _mapped(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed; its tensors stay on disk. Classes that it may hold are those of torch's `safe_globals`."""
    with tensors_alone(str(path)):
        found: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return found
