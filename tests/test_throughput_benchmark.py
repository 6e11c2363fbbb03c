"""Passes whose throughput is measured: their work, their graphs, and their rows."""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import benchmark_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dpsgd.models.wide_resnet import WideResNet


def test_the_large_networks_of_the_benchmark_have_the_work_that_is_told() -> None:
    throughput = benchmark_of("throughput_paths")

    for name, work in throughput.WORK.items():
        with torch.device("meta"):
            model = throughput.build_model(
                throughput.ModelConfig(**work.model),
                image_shape=(3, work.side, work.side),
                num_classes=work.classes,
            )
            image = torch.empty(1, 3, work.side, work.side)
        with FlopCounterMode(display=False) as counter:
            model(image)
        giga_macs = counter.get_total_flops() / 2e9
        assert giga_macs == pytest.approx(work.giga_macs, rel=2e-3), name  # 3 digits
    assert not set(throughput.SMALL) & {"nf-resnet-50 K=4", "nfnet-f3 K=4"}


def small_work(throughput: Any) -> Any:
    """Two examples of eight views of a WRN-10-1."""
    model = {"depth": 10, "width": 1}
    return throughput.Work(model=model, examples=2, views=8, giga_macs=0.1, side=8)


def networks() -> int:
    """Counts the Wide-ResNets that are there."""
    return sum(type(one) is WideResNet for one in gc.get_objects())


@pytest.mark.parametrize(
    "path", ["non-private, torch.compile", "vmap(grad), torch.compile"]
)
def test_a_compiled_path_is_one_graph_of_which_nothing_is_left(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = benchmark_of("throughput")
    graphs, cpu = CompileCounterWithBackend("eager"), torch.device("cpu")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    throughput.start_afresh(cpu)
    before = networks()
    with throughput.PATHS[path].operators():
        run = throughput.prepared(small_work(throughput), path, cpu)
        run()
        run()  # warns if it had to go on eagerly
    assert graphs.frame_count == 1
    assert networks() == before + 1

    del run
    throughput.start_afresh(cpu)
    assert networks() == before


def test_the_ordinary_network_is_ours_and_stays_channels_last() -> None:
    throughput = benchmark_of("throughput_paths")
    name, cpu = "non-private, eager", torch.device("cpu")
    grads = []
    for operators in (throughput.ordinary_operators, throughput.plain_operators):
        torch.manual_seed(0)
        with operators():
            grads.append(throughput.prepared(small_work(throughput), name, cpu)())
    # Float32 sums in another order, of gradients up to 1.
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    geometry = throughput.ConvGeometry(3, 2, 1, 1)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    weight, gain = torch.randn(6, 3, 3, 4), torch.ones(6)
    y = throughput.channels_last_conv2d(x, weight, gain, geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_rows_are_saved_before_a_later_path_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = benchmark_of("throughput")
    saved = tmp_path / "throughput.json"
    first, second = throughput.SMALL[:2]

    def measure(name: str, paths: list[str], device: torch.device) -> list[Any]:
        if name == second:
            raise RuntimeError("no memory left")
        return [throughput.row_of(name, path, device, 0.1) for path in paths]

    monkeypatch.setattr(throughput, "measure_in_turn", measure)
    arguments = ["throughput", "--device", "cpu", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--work", first, second])
    with pytest.raises(RuntimeError, match="no memory left"):
        throughput.main()

    rows = json.loads(saved.read_text())["rows"]
    assert len(rows) > 1
    assert {row["work"] for row in rows} == {first}


def test_saved_rows_of_one_machine_are_drawn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput = benchmark_of("throughput")
    paths = list(throughput.PATHS)

    def save(name: str, work: str, path: str, device: str) -> str:
        row = throughput.row_of(work, path, torch.device("cpu"), 0.1)
        facts = {"device": device, "versions": {"torch": "2.11.0"}}
        (tmp_path / name).write_text(json.dumps({**facts, "rows": [row]}))
        return str(tmp_path / name)

    second = save("a", throughput.SMALL[1], paths[0], "one")
    first = throughput.SMALL[0]
    others = [save(str(at), first, paths[at], "one") for at in (1, 0)]
    drawn = tmp_path / "drawn.svg"
    arguments = ["throughput", "--plot", str(drawn), "--from", second, *others]
    monkeypatch.setattr(sys, "argv", arguments)
    throughput.main()

    _, rows = throughput.read([Path(one) for one in (second, *others)])
    assert [(row["work"], row["path"]) for row in rows] == [
        (throughput.SMALL[0], paths[0]),
        (throughput.SMALL[0], paths[1]),
        (throughput.SMALL[1], paths[0]),
    ]
    assert throughput.SMALL[1] in drawn.read_text()
    assert throughput.SMALL[1] in capsys.readouterr().out

    other = save("d", throughput.SMALL[0], paths[0], "two")
    with pytest.raises(SystemExit, match="devices or versions differ"):
        throughput.read([Path(second), Path(other)])


def test_a_profile_says_what_a_pass_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = benchmark_of("pass_profile")
    monkeypatch.setitem(passes.WORK, "wrn16-4 K=16", small_work(passes))
    saved = tmp_path / "profile.json"
    monkeypatch.setattr(sys, "argv", ["p", "--device", "cpu", "--save", str(saved)])
    passes.main()

    found = json.loads(saved.read_text())
    names = [row["name"] for row in found["kernels"]]
    assert any("convolution" in name for name in names)
    times = [row["milliseconds"] for row in found["kernels"]]
    assert times == sorted(times, reverse=True)
    whole = sum(times) + found["between_kernels"]
    assert whole == pytest.approx(found["milliseconds"])
    # Of the stem, and of two in each of three blocks, forward and backward.
    convolutions = [row for row in found["kernels"] if "conv" in row["name"]]
    assert sum(row["launches"] for row in convolutions) >= 2 * 7
    assert "between kernels" in capsys.readouterr().out
