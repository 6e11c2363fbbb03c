"""A new network is a file and a line in the table, and all else asks it."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from made_up_images import make_store
from small_runs import dpsgd_eval, dpsgd_train, small_config, start, write_config
from torch import Tensor

from dpsgd.assembly import plan_of
from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError, fault
from dpsgd.models import MODELS, Architecture, Network
from dpsgd.models.layers import Linear
from dpsgd.report import read_run, run_report
from dpsgd.train import train_step

MOST = 8


class Perceptron(Network):
    """Hidden units over all pixels, which training leaves out at random."""

    takes_one_size: ClassVar[bool] = True

    def __init__(
        self,
        config: ModelConfig,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        pixels = torch.Size(image_shape).numel()
        self.draws_per_view = config.width
        self.hidden = Linear(pixels, config.width)
        self.classifier = Linear(config.width, num_classes)

    def forward(self, x: Tensor, uniforms: Tensor | None = None) -> Tensor:
        hidden = self.hidden(x.flatten(1)).tanh()
        if uniforms is not None:
            hidden = hidden * (uniforms > 0.5)
        return self.classifier(hidden)


def faults(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[str]:
    if config.width <= MOST:
        return []
    rule = f"must be at most {MOST} for {image_shape[-1]} pixels"
    return [fault("model.width", config.width, rule, "lower it")]


def title(config: ModelConfig) -> str:
    return f"Perceptron of {config.width}"


PERCEPTRON = Architecture(build=Perceptron, uses=("width",), faults=faults, title=title)


@pytest.fixture(autouse=True)
def _is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "perceptron", PERCEPTRON)


def changes(**more: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in more.items()}
    return {"model.name": "perceptron", "model.depth": 16, **named}


@pytest.mark.parametrize("engine", ["vmap", "ghost"])
def test_it_trains_on_the_draws_that_it_asks_for(tmp_path: Path, engine: str) -> None:
    run, state, plan = start(tmp_path, changes(model__width=3, runtime__engine=engine))
    before = {name: leaf.clone() for name, leaf in state.params.items()}
    microbatch = next(iter(run.load_views(run.sampler.draw(0), 0)))
    train_step(run, state)

    assert [part.shape[1:] for part in microbatch[2:-1]] == [(1, 3)]
    assert plan.num_parameters == 64 * 3 + 3 + 3 * 10 + 10
    same = [name for name, leaf in before.items() if leaf.equal(state.params[name])]
    assert not same
    assert run.evaluate(state.params).num_examples > 0


def test_a_run_is_resumed_measured_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    config = write_config(tmp_path, changes(model__width=3))
    assert dpsgd_train(config, "--run-dir", folder) == 0
    assert dpsgd_train("--resume", folder) == 0
    assert dpsgd_eval(folder, "--json") == 0

    planned = json.loads((folder / "plan.json").read_text())
    assert planned["network"] == "Perceptron of 3"
    assert "Perceptron of 3, 235 parameters" in run_report(read_run(folder)).html
    assert "perceptron, float32" in capsys.readouterr().out


def test_what_it_refuses_is_told_before_training() -> None:
    with pytest.raises(ConfigError, match=r"^model\.width=9: must be at most 8 for 8 "):
        plan_of(small_config(changes(model__width=9)))
    with pytest.raises(ConfigError, match=r"^model\.groups=4: perceptron has no such"):
        plan_of(small_config(changes(model__groups=4)))
    with pytest.raises(ConfigError, match=r"did you mean `perceptron`\?"):
        plan_of(small_config({"model.name": "perceptrom"}))


@pytest.mark.parametrize(("name", "depth"), [("perceptron", 16), ("convnet", 2)])
def test_one_that_takes_one_size_is_tested_on_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, depth: int
) -> None:
    for part, count in (("train", 60), ("test", 9)):
        make_store(tmp_path / part, count)
    sizes = {
        "model.name": name,
        "model.depth": depth,
        "model.width": 4,
        "data.source": "store",
        "data.train": str(tmp_path / "train"),
        "data.test": str(tmp_path / "test"),
        "data.num_examples": 60,
        "data.image_size": 8,
        "privacy.delta": 1e-3,
    }
    told = (
        f"data.eval_image_size=12: model.name={name} takes images of one size; "
        "remove it"
    )
    with pytest.raises(ConfigError) as error:
        plan_of(small_config({**sizes, "data.eval_image_size": 12}))
    assert str(error.value) == told
    run_dir = tmp_path / "run"
    assert dpsgd_train(write_config(tmp_path, sizes), "--run-dir", run_dir) == 0
    assert dpsgd_eval(run_dir, "--set", "data.eval_image_size=12") == 2
    assert capsys.readouterr().err == f"{told}\n"
