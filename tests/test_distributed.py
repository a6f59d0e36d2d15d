"""The losses over the global batch: every number of ranks gives the losses and the steps of one process.

Each number of ranks is one set of gloo processes, which work through everything here and write what they found; a
spawned process imports torch for seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel

from in2nect import In2NeCTLoss, IntraClassLoss, distributed, functional, ops, use_backend
from in2nect.metrics import CollapseMetrics
from in2nect.ops.sample_pixels import _hash, _shifted, _stream, hash_pixels
from in2nect.training.losses import SegmentationLoss
from in2nect.training.settings import LossSettings
from tests.samples import clustered

CLASSES, WIDTH, IMAGES, STEPS = 4, 5, 6, 5
SPLITS = {"1": (6,), "2": (3, 3), "2 uneven": (5, 1), "3": (2, 2, 2), "3 uneven": (1, 3, 2)}  # images of each rank
SETTINGS: dict[str, dict[str, Any]] = {
    "moments": {},
    "moments by class": {"covariance": "class", "temperature": 0.5, "denominator": "means"},
    "moments at the grid": {"resolution": "feature", "projection": 6},
    "exact": {"estimator": "exact", "temperature": 0.4},
    "exact of raw rows": {"estimator": "exact", "normalize": False, "resolution": "feature"},
    "sampled": {"estimator": "sampled", "per_class": 9},
    "sampled of raw rows": {"estimator": "sampled", "per_class": 5, "normalize": False, "resolution": "feature"},
}
COLLECTIVES = {  # of a forward and of a backward pass, by estimator: docs/distributed.md has the table
    "moments": (["all_reduce"] * 3, []),
    "exact": (["all_reduce"] * 3 + ["all_gather"] * 3, ["all_gather"] * 3 + ["reduce_scatter"]),
    "sampled": (["all_reduce"] * 3 + ["all_gather"] * 2, []),
}


class Host(nn.Module):
    """A small network with its losses: L = L_seg + L_inter + L_intra in float64."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.Tanh(), nn.Conv2d(WIDTH, WIDTH, 1)
        )
        self.classifier = nn.Conv2d(WIDTH, CLASSES, 1)
        self.criterion = In2NeCTLoss(CLASSES, WIDTH, weight=1.0, **settings)
        self.double()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(False)

    def forward(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        logits = F.interpolate(self.classifier(features), size=labels.shape[1:], mode="bilinear")
        total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
        seg = distributed.global_mean(total, torch.count_nonzero(labels != 255), process_group="world")
        terms = self.criterion(features, labels, generator=generator)
        return seg + terms.total, torch.stack([seg, terms.inter, terms.intra]).detach()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images (6, 3, 8, 8) and labels of a step: class 3 lies in the first image alone, class 2 is a single pixel of the
    last, class 1 is nowhere at step 1; the first half is not labelled at step 2, and nothing is at step 3."""
    generator = seeded(step)
    images = torch.randn(IMAGES, 3, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 2, (IMAGES, 8, 8), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    labels[0, 2:5] = 3
    labels[-1, 3, 3] = 2
    if step == 1:
        labels[labels == 1] = 0
    if step == 2:
        labels[: IMAGES // 2] = 255
    if step == 3:
        labels[:] = 255
    return images, labels


def train(settings: dict[str, Any], split: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """Losses of every step and the parameters after the last, of this rank of a split."""
    host = Host(**settings)
    model = DistributedDataParallel(host) if len(split) > 1 else host
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        images, labels = (part.split(split)[rank] for part in batch(step))
        # the first rank's draw is what counts
        total, terms = model(images, labels, seeded(100 * rank + step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(terms)
    return {"losses": torch.stack(found), "parameters": nn.utils.parameters_to_vector(host.parameters()).detach()}


def train_all(splits: list[str], rank: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    found = {(name, split): train(SETTINGS[name], SPLITS[split], rank) for name in SETTINGS for split in splits}
    with use_backend("reference"):  # elsewhere it is cpp, if it is there
        for name in ("moments", "moments by class", "exact"):
            found[f"{name} by the reference", splits[-1]] = train(SETTINGS[name], SPLITS[splits[-1]], rank)
    return found


def rows_of(rank: int | None, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features and labels of one of two ranks, of unequal sizes, or of both, one behind the other."""
    features, labels = clustered(CLASSES, WIDTH, batch=3, labels=(10, 8), absent=(1,), singleton=3, dtype=dtype)
    if rank is None:
        return features, labels
    return features.split((1, 2))[rank], labels.split((1, 2))[rank]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value_and_gradient(loss: Callable[[Tensor], Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    z = features.clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


class Calls(NamedTuple):
    """Names of the collectives that were called, and the bytes that a rank put in."""

    names: list[str]
    sizes: list[int]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls([], [])

    def counting(name: str, function: Callable, given: int) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.names.append(name)
            calls.sizes.append(arguments[given].nbytes)
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting("all_reduce", dist.all_reduce, 0))
        patch.setattr(distributed, "_all_gather", counting("all_gather", distributed._all_gather, 1))
        patch.setattr(distributed, "_reduce_scatter", counting("reduce_scatter", distributed._reduce_scatter, 1))
        yield calls


# What two ranks do beside training. Each check runs on both ranks and raises where it does not hold.


def check_gradient_is_ranks_times_the_true_one(rank: int) -> None:
    everything, all_labels = rows_of(None)
    features, labels = rows_of(rank)
    for name, settings in SETTINGS.items():
        options = {key: value for key, value in settings.items() if key not in ("denominator", "projection")}
        of_all, of_rank = (IntraClassLoss(CLASSES, process_group=group, **options) for group in (None, "world"))
        true = value_and_gradient(lambda z, f=of_all: f(z, all_labels, generator=seeded(3)), everything)
        ours = value_and_gradient(lambda z, f=of_rank: f(z, labels, generator=seeded(3 + rank)), features)
        torch.testing.assert_close(ours[0], true[0], rtol=1e-12, atol=0, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(
            ours[1], 2 * true[1].split((1, 2))[rank], rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


def check_second_derivative_of_the_means(rank: int) -> None:
    etf = torch.randn(CLASSES, WIDTH, dtype=torch.float64, generator=seeded(5))

    def penalty(z: Tensor, labels: Tensor, direction: Tensor, group: Any) -> Tensor:
        means, counts = functional.class_means(z, labels, CLASSES, process_group=group)
        (gradient,) = torch.autograd.grad(functional.inter_class_loss(means, counts, etf), z, create_graph=True)
        return (gradient * direction).sum()

    everything, all_labels = rows_of(None)
    directions = torch.randn(everything.shape, dtype=torch.float64, generator=seeded(6))
    _, true = value_and_gradient(lambda z: penalty(z, all_labels, directions, None), everything)
    features, labels = rows_of(rank)
    direction = directions.split((1, 2))[rank]
    _, ours = value_and_gradient(lambda z: penalty(z, labels, direction, "world"), features)
    # the penalty is of twice the true gradient, and is averaged over two ranks: their average is the true penalty
    torch.testing.assert_close(ours, 2 * true.split((1, 2))[rank], rtol=1e-10, atol=1e-14)


def check_no_group_is_this_rank_alone(rank: int) -> None:
    features, labels = rows_of(rank)
    with counted(pytest.MonkeyPatch()) as calls:
        for estimator in COLLECTIVES:
            criterion = In2NeCTLoss(CLASSES, WIDTH, estimator=estimator, process_group=None).double()
            value, _ = value_and_gradient(lambda z, f=criterion: f(z, labels).total, features)
            assert value > 0
        functional.intra_class_loss(features, labels, CLASSES)  # functions are of the batch at hand by default
    assert calls.names == []


def check_a_rank_without_pixels(rank: int) -> None:
    features, labels = rows_of(rank)
    if rank == 1:
        features, labels = features[:0], labels[:0]
    everything, all_labels = rows_of(0)
    for estimator in COLLECTIVES:
        criterion = IntraClassLoss(CLASSES, estimator=estimator)
        true, gradient = value_and_gradient(
            lambda z, e=estimator: functional.intra_class_loss(
                z, all_labels, CLASSES, estimator=e, generator=seeded(1)
            ),
            everything,
        )
        ours, own = value_and_gradient(lambda z, f=criterion: f(z, labels, generator=seeded(1)), features)
        torch.testing.assert_close(ours, true)
        torch.testing.assert_close(own, 2 * gradient if rank == 0 else features)


def check_low_precision(rank: int) -> None:
    """Sums over ranks are in float32, and bfloat16 rows are sent as they are."""
    everything, all_labels = rows_of(None, dtype=torch.bfloat16)
    features, labels = rows_of(rank, dtype=torch.bfloat16)
    for estimator in COLLECTIVES:
        options = {"estimator": estimator, "per_class": 20}
        true = functional.intra_class_loss(everything, all_labels, CLASSES, generator=seeded(2), **options)
        with counted(pytest.MonkeyPatch()) as calls:
            ours, gradient = value_and_gradient(
                lambda z, o=options: functional.intra_class_loss(
                    z, labels, CLASSES, generator=seeded(2), process_group="world", **o
                ),
                features,
            )
        assert ours.dtype == torch.float32 and gradient.dtype == torch.bfloat16 and calls.names
        torch.testing.assert_close(ours, true, rtol=2e-6, atol=0)


def check_collectives(rank: int) -> None:
    """How many, and that none but those of exact grows with the pixels."""
    features, labels = rows_of(rank)
    for estimator, (forward, backward) in COLLECTIVES.items():
        m = 9
        criterion = IntraClassLoss(CLASSES, estimator=estimator, per_class=m)
        z = features.clone().requires_grad_()
        with counted(pytest.MonkeyPatch()) as calls:
            loss = criterion(z, labels)
        assert sorted(calls.names) == sorted(forward), (estimator, calls.names)
        if estimator == "moments":
            k, d = CLASSES, WIDTH
            assert calls.sizes == [8 * k, 8 * (k * d + k + d * d), 8 * (1 + k * d)]
        if estimator == "sampled":
            k, d = CLASSES, WIDTH
            assert sorted(calls.sizes) == sorted([8 * (k * d + k), 8 * k, 8 * 5, 8 * 2 * k * m, 8 * 2 * k * m * d])
        with counted(pytest.MonkeyPatch()) as calls:
            loss.backward()
        assert sorted(calls.names) == sorted(backward), (estimator, calls.names)
    with counted(pytest.MonkeyPatch()) as calls:
        In2NeCTLoss(CLASSES, WIDTH)(features, labels)
    assert len(calls.names) == 3  # the inter-class loss rides along


def check_one_graph(rank: int) -> None:
    features, labels = rows_of(rank, dtype=torch.float32)
    for estimator in COLLECTIVES:
        criterion = In2NeCTLoss(CLASSES, WIDTH, estimator=estimator)
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        results = []
        for function in (criterion, compiled):
            torch.manual_seed(rank)
            results.append(value_and_gradient(lambda z, f=function: f(z, labels).total, features))
        torch.testing.assert_close(results[1], results[0])


def check_operators(rank: int) -> None:
    features, labels = rows_of(rank)
    group = distributed.group_name("world")
    z = features.requires_grad_()
    opcheck(torch.ops.in2nect.class_moments, (z, labels, CLASSES, 255, "label", 0.7, "pooled", True, group))
    opcheck(torch.ops.in2nect.class_sums, (z, labels, CLASSES, 255, "label", True, True, group))
    opcheck(torch.ops.in2nect.intra_exact, (z, labels[:, ::2, ::2], CLASSES, 255, 0.7, True, group))
    seeds = torch.tensor([[1, 2], [3, 4]])
    opcheck(torch.ops.in2nect.sample_global_pixels, (labels, CLASSES, 3, seeds, 255, group))
    indices = ops.sample_global_pixels(labels, CLASSES, 3, seeds, group).flatten()
    opcheck(torch.ops.in2nect.gather_rows, (z, indices, 10, 8, True, group))


def check_sample(rank: int) -> None:
    _, all_labels = rows_of(None)
    _, labels = rows_of(rank)
    seeds = torch.tensor([[11, 12], [-13, 14]])
    group = distributed.group_name("world")
    ours = ops.sample_global_pixels(labels, CLASSES, 7, seeds + rank, group)
    first = all_labels.split((1, 2))[0].numel()
    for drawn, seed in zip(ours, seeds):
        true = ops.sample_pixels(all_labels, CLASSES, 7, seed)
        here = (true >= 0) & ((true < first) if rank == 0 else (true >= first))
        assert torch.equal(drawn, torch.where(here, true - first * rank, -1)) and here.any()


def check_collapse_metrics(rank: int) -> None:
    everything, all_labels = rows_of(None)
    features, labels = rows_of(rank)
    together, ours = CollapseMetrics(CLASSES, WIDTH), CollapseMetrics(CLASSES, WIDTH)
    predictions = all_labels.clamp(max=2)
    together.update(everything, all_labels)
    together.update_agreement(everything, all_labels, predictions)
    ours.update(features, labels)
    ours.all_reduce()
    ours.update_agreement(features, labels, predictions.split((1, 2))[rank])
    ours.all_reduce()
    assert ours.compute() == pytest.approx(together.compute(), rel=1e-12)


def check_loss_of_a_run(rank: int) -> None:
    logits = torch.randn(3, CLASSES, 10, 8, dtype=torch.float64, generator=seeded(2))
    _, labels = rows_of(None)
    loss = SegmentationLoss(LossSettings(label_smoothing=0.1))
    own = labels.split((1, 2))[rank]
    ours = value_and_gradient(lambda z: loss(z, own), logits.split((1, 2))[rank])
    true = value_and_gradient(lambda z: F.cross_entropy(z, labels, ignore_index=255, label_smoothing=0.1), logits)
    torch.testing.assert_close(ours[0], true[0])
    torch.testing.assert_close(ours[1], 2 * true[1].split((1, 2))[rank])


CHECKS = [check for name, check in globals().items() if name.startswith("check_")]


def check_group_of_two(rank: int) -> None:
    """Of three ranks, two form a group and the third stays out."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    features, labels = rows_of(rank // 2)
    everything, all_labels = rows_of(None)
    ours = IntraClassLoss(CLASSES, process_group=group)(features, labels)
    torch.testing.assert_close(ours, functional.intra_class_loss(everything, all_labels, CLASSES))


def work(rank: int, ranks: int, folder: Path) -> None:
    """One process of a set. It ends where a check fails, since it would no longer call what the others call."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.save(train_all([name for name in SPLITS if name.startswith(str(ranks))], rank), folder / f"{rank}.pt")
    for check in CHECKS if ranks == 2 else [check_group_of_two]:
        try:
            check(rank)
        except Exception:
            (folder / f"{rank}.txt").write_text(f"rank {rank}, {check.__name__}: {traceback.format_exc()}")
            raise
    dist.barrier()
    dist.destroy_process_group()


class Found(NamedTuple):
    """What a set of processes found: what each of them trained, how they ended, and which checks failed."""

    trained: list[dict[tuple[str, str], dict[str, Tensor]]]
    exit_codes: list[int | None]
    failures: str


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, ranks, folder)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        worker.kill()  # where it waits for one that has ended
        worker.join()
    trained = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    failures = "".join(path.read_text() for path in sorted(folder.glob("*.txt")))
    return Found(trained, [worker.exitcode for worker in workers], failures)


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], dict[str, Tensor]]:
    return train_all(["1"], 0)


def test_every_number_of_ranks_takes_the_same_steps(found, alone):
    for rank, of_rank in enumerate(found.trained):
        assert len(of_rank) >= 2 * len(SETTINGS)
        for (name, split), trained in of_rank.items():
            true = alone[name, "1"]
            for what in ("losses", "parameters"):
                difference = (trained[what] - true[what]).abs().max().item()
                assert difference < 1e-10, f"{name}, {split}, rank {rank}: {what} differ by {difference:.1e}"


def test_checks_within_the_ranks(found):
    assert found.exit_codes == [0] * len(found.trained), found.failures


def test_the_steps_are_of_something(alone):
    """Every loss is there, and moves the parameters, but at the step without a label."""
    start = {name: nn.utils.parameters_to_vector(Host(**settings).parameters()) for name, settings in SETTINGS.items()}
    for (name, _), trained in alone.items():
        assert (trained["losses"][[0, 1, 2, 4]] > 0.1).all() and not trained["losses"][3].any(), name
        moved = (trained["parameters"] - start[name.removesuffix(" by the reference")]).abs()
        assert (moved > 1e-4).float().mean() > 0.8, name


def test_no_process_group_is_found_alone():
    assert distributed.group_name("world") is None and distributed.group_name(None) is None
    assert distributed.number_of_ranks(None) == 1
    with pytest.raises(ValueError, match=r'process_group is \'all\'; expected .*"world"'):
        distributed.group_name("all")


def test_global_mean_alone():
    total = torch.tensor(6.0, requires_grad=True)
    distributed.global_mean(total, torch.tensor(4), process_group="world").backward()
    assert total.grad == 0.25
    assert distributed.global_mean(total * 0, torch.tensor(0.0), process_group="world") == 0
    assert distributed.global_mean(total, torch.tensor(0.5), process_group="world") == 12


@pytest.mark.parametrize("pixels", [0, 1, 77, 2**40 + 5])
def test_shifted_seeds(pixels):
    seeds = torch.tensor([[0, 0], [2**62 - 1, 3], [-5, 2**61]])
    shifted = _shifted(seeds, torch.tensor(pixels))
    indices = torch.arange(100) + pixels
    for seed, moved in zip(seeds, shifted):
        assert torch.equal(hash_pixels(100, moved), _hash(_stream(seed), indices))
