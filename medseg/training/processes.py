"""Several processes training one model: what `torchrun` starts, or one process alone.

Every process draws its share of a step's samples, which depend on the step alone; gradients are
averaged by PyTorch's DDP, or with `fully_shard` (FSDP) where a network does not fit one device.
Scans to validate with are dealt out, too. Files are the first process's business, but for the label
maps that each has found.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medseg.config import TrainConfig
from medseg.errors import BadConfig, Interrupted, MedsegError
from medseg.files import TEMPORARY, atomic_write, output_errors
from medseg.inference import choose_device
from medseg.machine import free_bytes, resident_bytes
from medseg.networks import has_depthwise
from medseg.training.watch import GONE, Watch, is_about_another

T = TypeVar("T")
#: Numbers of what is joined in one process, such as each fold: all count alike.
_RUNS = itertools.count()
#: Seconds in which all processes must have come.
_COME_S = 300.0
#: Seconds that they wait for each other at most: while one prepares, or scores whole scans.
_WAIT_S = 24 * 3600.0
#: Deals numbers from 0 out: what a function gives for each of so many, in order.
Deal = Callable[[int, Callable[[int], T]], list[T]]
#: Seconds until what another process has written must be seen: a network file system remembers for
#: up to half a minute that a name was not there.
_SEEN_S = 40.0


class Processes:
    """The processes of a run; as a context it joins them at the start and lets them go at the
    end.
    """

    def __init__(self, device: str = "auto") -> None:
        """device: 'auto', 'cpu', 'cuda' or 'cuda:N'. Raises `BadConfig` for one that is not here,
        and where several processes would share a card.
        """
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        self.sharded = False
        self._whole: nn.Module | None = None
        self._watch: Watch | None = None
        self._is_stopping = False
        self.device = _device_of(device, int(os.environ.get("LOCAL_RANK", 0)), self.size)
        self.room_bytes = self._room(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def _room(self, neighbours: int) -> int | None:
        """What a process may hold beside the others of its machine, as it is before any of them
        takes much; None where it is alone, or a card's memory counts.
        """
        if neighbours == 1 or self.device.type != "cpu":
            return None
        return resident_bytes() + free_bytes() // neighbours

    def __enter__(self) -> Processes:
        if self.size > 1:
            try:
                self._join()
            except RuntimeError as error:
                if not is_about_another(error):
                    raise
                raise MedsegError(GONE) from None
        return self

    def _join(self) -> None:
        on_card = self.device.type == "cuda"
        if on_card:
            torch.cuda.set_device(self.device)
        distributed.init_process_group(
            "nccl" if on_card else "gloo",
            store=distributed.PrefixStore(f"run{next(_RUNS)}", meeting_place()),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=_WAIT_S),
            device_id=self.device if on_card else None,
        )
        self._watch = self._begin_watch()

    def _begin_watch(self) -> Watch:
        # A store of its own: one that waits for a key lets nobody else in.
        place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(place, port, is_master=False)
        name = f"medseg-{self.first_says(float(secrets.randbits(50))):.0f}"
        watch = Watch(store, name=name, rank=self.rank, size=self.size)
        watch.start()
        return watch

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.size == 1:
            return
        if error is None or (self._is_stopping and isinstance(error, Interrupted)):
            if self._watch is not None:
                self._watch.stop()
            distributed.destroy_process_group()
        elif self._watch is not None and not self._watch.fail():
            raise SystemExit(getattr(error, "exit_code", MedsegError.exit_code)) from None
        elif is_about_another(error):
            raise MedsegError(GONE) from None
        if isinstance(error, Interrupted) and self._is_stopping and not self.first:
            raise SystemExit(error.exit_code) from None  # the first says it

    @contextmanager
    def repeatable(self, wanted: bool) -> Iterator[None]:
        """On a GPU only kernels that give the same bits every time, where PyTorch has some; on a
        CPU all do anyway.
        """
        if not wanted:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        deterministic: Any = torch.utils.deterministic  # its attributes are made at run time
        fills = deterministic.fill_uninitialized_memory
        on_card = self.device.type == "cuda"
        torch.use_deterministic_algorithms(True, warn_only=not on_card)
        torch.backends.cudnn.benchmark = False
        # It guards against reading what nobody wrote, and costs a pass over every new tensor.
        deterministic.fill_uninitialized_memory = False
        try:
            # Gradients of the other kinds of attention differ from run to run on a card.
            with sdpa_kernel(SDPBackend.MATH) if on_card else nullcontext():
                yield
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            operation = str(error).split(" ", 1)[0]
            raise BadConfig(
                f"train.deterministic: {operation} gives other bits every time on this device;"
                " choose another architecture, or train without --deterministic"
            ) from None
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
            deterministic.fill_uninitialized_memory = fills

    def spread(self, network: nn.Module, parallel: str) -> tuple[nn.Module, nn.Module]:
        """The network as it is kept, and as it is called in training."""
        if self.size == 1:
            network = innermost_channels(network, self.device)
            return network, network
        if parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            # For validation, and off the card that is short.
            self._whole, self.sharded = deepcopy(network).cpu(), True
            for child in network.children():
                for part in child if isinstance(child, nn.ModuleList) else [child]:
                    if any(True for _ in part.parameters()):
                        fully_shard(part)
            fully_shard(network)
            return network, network
        network = innermost_channels(network, self.device)
        devices = [self.device.index] if self.device.type == "cuda" else None
        return network, nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def check_batch(self, batch: int) -> None:
        """Raises `BadConfig` for a number of samples that cannot be shared by the processes."""
        if batch % self.size:
            raise BadConfig(
                f"train.batch={batch} cannot be shared by {self.size} processes: start a number of"
                " them that divides it, or give a new run a multiple of their number"
            )

    def share(
        self, settings: TrainConfig, step: int, mix: Callable[[int, int, int], int]
    ) -> tuple[list[int], range]:
        """The seeds of this process's samples of a step, and their places in the whole run."""
        self.check_batch(settings.batch)
        count = settings.batch // self.size
        mine = range(self.rank * count, (self.rank + 1) * count)
        first = step * settings.batch
        return [mix(settings.seed, step, n) for n in mine], range(
            first + mine.start, first + mine.stop
        )

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean of each number over all processes, where it was; nobody waits for it."""
        if self.size == 1:
            return numbers
        numbers = numbers.clone()
        distributed.all_reduce(numbers)
        return numbers / self.size

    def agree(self, position: float, due: bool, stop: int) -> tuple[float, bool, int]:
        """The first process's position and whether to save, and the signal to stop that any process
        was sent, or 0.
        """
        if self.size == 1:
            return position, due, stop
        mine = [position, float(due)] if self.first else [0.0, 0.0]
        numbers = torch.tensor([*mine, float(stop)], dtype=torch.float64, device=self.device)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
        first, any_due, signal = numbers.tolist()
        self._is_stopping = bool(signal)
        return first, bool(any_due), int(signal)

    def first_says(self, number: float) -> float:
        """The first process's number."""
        if self.size == 1:
            return number
        buffer = torch.tensor([number], dtype=torch.float64, device=self.device)
        distributed.broadcast(buffer, 0)
        return float(buffer[0])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, by their numbers and the same for all; it travels as JSON, in
        which a number keeps all its bits.
        """
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(one) for one in self._from_all(torch.tensor([len(text)]))]
        parts = self._from_all(nn.functional.pad(text, (0, max(lengths) - len(text))))
        return [json.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths)]

    def _from_all(self, value: Tensor) -> list[Tensor]:
        value = value.to(self.device)
        parts = [torch.empty_like(value) for _ in range(self.size)]
        distributed.all_gather(parts, value)
        return [part.cpu() for part in parts]

    def mine(self, count: int) -> range:
        """Those of the numbers from 0 to `count` that are dealt to this process."""
        return range(self.rank, count, self.size)

    def deal(self, count: int, do: Callable[[int], T]) -> list[T]:
        """What `do` gives for each number from 0 to `count`, in order and the same for all
        processes, of which each does its share (`mine`).

        Where there are several it comes as JSON gives it back. What `do` raises ends all of them.
        """
        parts = self.gather([do(number) for number in self.mine(count)])
        return [parts[number % self.size][number // self.size] for number in range(count)]

    def same(self, values: Iterable[Tensor]) -> None:
        """Make the tensors of every process those of the first, to the bit: statistics that a
        network keeps of what it sees are each process's own.
        """
        for value in values if self.size > 1 else ():
            buffer = value.contiguous()
            distributed.broadcast(buffer, 0)
            value.copy_(buffer)

    def check_folder(self, folder: Path) -> None:
        """Make the run folder, and look whether every process sees what the first writes there.
        Raises `BadConfig` where one does not.
        """
        if self.first:
            with output_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        if self.size == 1:
            return
        marker = folder / f"{TEMPORARY}{self.gather(secrets.token_hex(12))[0]}"
        if self.first:
            with atomic_write(marker):
                pass
        self.wait()
        sights = self.gather([platform.node(), is_seen(marker)])
        if self.first:
            marker.unlink(missing_ok=True)
        blind = [name for name, sees in sights if not sees]
        if blind:
            raise BadConfig(
                f"{folder}: what the first process writes there on {sights[0][0]} is not seen by"
                f" {len(blind)} of {self.size} processes ({blind[0]}); give with -o a folder that"
                " every machine sees under the same name"
            )

    def check_same(self, view: Mapping[str, str], place: Path | str) -> None:
        """Raises `BadConfig` in every process where one of them sees other data in a place than the
        first: another disk under the same name, or an older copy. view: what there is, by names for
        people, with hashes.
        """
        (_, first), *others = self.gather([platform.node(), dict(view)])
        for rank, (machine, other) in enumerate(others, start=1):
            names = [name for name in first | other if first.get(name) != other.get(name)]
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise BadConfig(
                    f"{place}: process {rank} on {machine} does not see the same {names[0]}{more}"
                    " as the first one; give data that every machine sees under the same name"
                )

    def like(self, value: Tensor, other: Tensor) -> Tensor:
        """A whole tensor laid out as another is: shared out over the processes, if that is."""
        if not self.sharded:
            return value
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(other, DTensor):
            return value
        return distribute_tensor(value.to(self.device), other.device_mesh, other.placements)

    @contextmanager
    def whole_network(self, network: nn.Module, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
        """A network that is shared out in one piece with these weights, for a while, on each
        process's device; one that is not, as it is.
        """
        if self._whole is None:
            yield network
            return
        self._whole.load_state_dict(weights)
        try:
            yield self._whole.to(self.device)
        finally:
            self._whole.cpu()


@cache
def meeting_place() -> distributed.Store:
    """The store by which all processes find each other, which is the same to the end, so that
    nobody comes to one that is about to close. Raises `MedsegError` where some do not come.
    """
    come = timedelta(seconds=_COME_S)
    try:
        store: distributed.Store = next(distributed.rendezvous("env://", timeout=come))[0]
    except RuntimeError:
        raise MedsegError(
            f"not all processes of this run have come within {_COME_S:.0f} seconds; see what the"
            " others say, and start all of them again"
        ) from None
    store.set_timeout(timedelta(seconds=_WAIT_S))
    return store


def alone(count: int, do: Callable[[int], T]) -> list[T]:
    """As `Processes.deal`, all done by this process."""
    return [do(number) for number in range(count)]


@contextmanager
def joined(device: str, run: Path) -> Iterator[Processes]:
    """The processes of a run, of which each sees its folder. Raises `BadConfig` where one does
    not.
    """
    with Processes(device) as processes:
        processes.check_folder(run)
        yield processes


def is_seen(path: Path) -> bool:
    """Whether there is what another process has written, at once or after a while."""
    until = time.monotonic() + _SEEN_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
        with suppress(OSError):
            any(path.parent.iterdir())  # asks a server what is there now
    return True


def _device_of(device: str, local_rank: int, size: int) -> torch.device:
    """Where a process trains: on a card of its own where there are several processes."""
    if device == "mps":
        raise BadConfig("medseg trains on the CPU or with CUDA, and not on mps; use --device cpu")
    if torch.cuda.is_available():
        # cuBLAS reads it when it is first used, and may else sum in another order every time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    place = choose_device(device)
    if place.type != "cuda" or size == 1:
        return place
    cards = torch.cuda.device_count()
    if place.index is not None or local_rank >= cards:
        raise BadConfig(
            f"each process trains on a card of its own, and there are {cards} here: start as many"
            " with --nproc-per-node, and give --device cuda or cpu without a number"
        )
    return torch.device("cuda", local_rank)


def innermost_channels(network: nn.Module, device: torch.device) -> nn.Module:
    """On a GPU the network with channels innermost in memory, as its 3-D convolutions are fastest.

    On a CPU as it is: oneDNN chooses layouts of its own, and training in float32 was 5 to 15 %
    slower with this one. In bfloat16 it is the images that come so (`train`), and all maps follow
    them. So, too, where channels are convolved one by one.
    """
    if device.type == "cpu" or has_depthwise(network):
        return network
    channels_last: nn.Module = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return channels_last


def whole(value: Any) -> Any:
    """A tensor in one piece, whether it was shared out or not; every process must ask for it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
