import contextlib
import dataclasses
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from small_runs import ROOT

from dpsgd.cli import privacy, train
from dpsgd.config import Config, config_to_dict, load_config
from dpsgd.data import published_facts
from dpsgd.planning import outline
from dpsgd.sweep.plan import SweepPlan, read_sweep

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATHS = re.compile(r"\b(?:bin|configs|examples|docs|dpsgd|benchmarks)/[\w./-]*\w")
TARGETS = re.compile(r"\bmake ((?:[a-z-]+)(?:[ \t]+[a-z-]+)*)")


def code_of(text: str) -> str:
    """What a document shows as code: blocks and spans."""
    blocks = re.findall(r"```.*?```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`[^`]+`", rest)])


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def code(request: pytest.FixtureRequest) -> str:
    return code_of(Path(request.param).read_text())


def test_files_that_documents_name_exist(code: str) -> None:
    named = set(PATHS.findall(code))

    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_link_to_exists(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    inside = [link for link in links if "://" not in link]

    assert not [link for link in inside if not (path.parent / link).exists()]


def test_make_targets_that_documents_name_exist(code: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {word for words in TARGETS.findall(code) for word in words.split()}

    assert {"setup", "train", "test"} <= known
    assert not named - known


def test_the_readme_leads_with_the_two_commands() -> None:
    code = code_of((ROOT / "README.md").read_text())

    assert "make train" in code
    assert "make test" in code


def test_the_patterns_find_what_they_should() -> None:
    code = code_of("run `make train`:\n```\nbin/dpsgd-train configs/a.yaml --plan\n```")

    assert PATHS.findall(code) == ["bin/dpsgd-train", "configs/a.yaml"]
    assert TARGETS.findall(code) == ["train"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_header_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    header = text[: text.index("\ndata:")]
    config = load_config(path)

    assert all(line.startswith("#") for line in header.splitlines())
    assert f"bin/dpsgd-train configs/{path.name}" in header
    if config.model.name != "convnet":
        assert "arXiv:2204.13650" in header
        assert "Expected:" in header or not config.privacy.enabled


def test_every_cifar10_setting_of_the_paper_is_shipped() -> None:
    names = {path.stem for path in CONFIGS}

    assert names >= {
        f"cifar10_wrn{network}_eps{epsilon}"
        for network in ("16-4", "40-4")
        for epsilon in (1, 2, 3, 4, 6, 8)
    }
    assert names >= {
        f"cifar10_wrn28-10_imagenet32_{trained}_eps{epsilon}"
        for trained in ("all", "classifier")
        for epsilon in (1, 2, 4, 8)
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_name_of_a_config_tells_its_settings(path: Path) -> None:
    network = r"_wrn(?P<depth>\d+)-(?P<width>\d+)"
    tuned = r"(?P<from>_finetune|_imagenet32_(?P<trained>all|classifier))?"
    private = rf"(?P<data>cifar10|cifar100){network}{tuned}_eps(?P<eps>\d)(_beyond)?"
    public = rf"pretrain_(?P<data>[\w-]+){network}"
    found = re.fullmatch(private, path.stem) or re.fullmatch(public, path.stem)
    config = load_config(path)

    if config.data.source == "store":
        return  # the test below is of these
    if found is None:
        assert path.stem == config.data.source
        return
    told = found.groupdict()
    assert (config.model.depth, config.model.width) == (
        int(told["depth"]),
        int(told["width"]),
    )
    assert config.privacy.enabled == ("eps" in told)
    if config.privacy.enabled:
        assert config.data.name == told["data"]
        assert config.privacy.target_epsilon == int(told["eps"])
        assert (config.model.init_from is not None) == (told["from"] is not None)
        assert config.finetune.train == (told["trained"] or "all")


# Every setting of ImageNet and Places365 that is shipped; the paper's but for `tan`.
LARGE = [
    "imagenet_nf-resnet-50_eps8",
    "imagenet_nf-resnet-50_tan_eps8",
    "imagenet_nf-resnet-200_classifier_eps8",
    *(f"imagenet_nfnet-f3_classifier_eps{eps}" for eps in (0.1, 0.5, 1, 2, 4, 8)),
    "places365_nf-resnet-50_classifier_eps8",
    "places365_nf-resnet-50_all_eps8",
]


def test_every_setting_of_large_images_is_shipped() -> None:
    found = {path.stem for path in CONFIGS if load_config(path).data.source == "store"}

    assert found == {*LARGE, "tiny-imagenet-20_nf-resnet-50_eps8"}


@pytest.mark.parametrize("name", LARGE)
def test_a_setting_of_large_images_can_be_run_as_its_name_tells(name: str) -> None:
    data, network, *how, epsilon = name.split("_")
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    facts = published_facts(config.data)

    assert config.data.name == data
    assert config.privacy.target_epsilon == float(epsilon.removeprefix("eps"))
    depth_or_variant = network.rpartition("-")[2].upper()
    assert depth_or_variant in (str(config.model.depth), config.model.variant)
    assert (config.model.init_from is None) == (how in ([], ["tan"]))
    assert how in ([], ["tan"], [config.finetune.train])
    assert facts is not None
    outline(config, facts)  # the network takes all its settings
    # What the plan would refuse, without the calibration that takes it seconds.
    assert config.privacy.delta is not None
    assert config.privacy.delta < 1 / facts.num_examples
    assert config.privacy.expected_batch_size < facts.num_examples


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_read_and_its_header_says_what_it_takes(path: Path) -> None:
    text = path.read_text()
    header = text[: text.index("\nconfig:")]
    plan = read_sweep(path)

    assert all(line.startswith("#") for line in header.splitlines())
    assert f"bin/dpsgd-sweep configs/sweeps/{path.name}" in header
    assert f"{len(plan.runs)} runs" in header
    for word in ("Budget:", "Measured:"):
        assert word in header


def test_small_batches_have_the_noise_of_the_large_one_for_each_example() -> None:
    plan = read_sweep(ROOT / "configs" / "sweeps" / "cifar10_small_batch.yaml")
    privacy = [run.config.privacy for run in plan.runs]
    ratios = {one.noise_multiplier / one.expected_batch_size for one in privacy}

    # Epsilon 8 takes 2.56281 at 4,096; six digits of each noise are written down.
    assert max(ratios) == pytest.approx(2.56281 / 4096, rel=1e-5)
    assert min(ratios) == pytest.approx(max(ratios), rel=1e-5)
    assert len({run.config.train.num_steps for run in plan.runs}) == 1


def test_the_ladder_ends_with_the_whole_recipe() -> None:
    plan = read_sweep(ROOT / "configs" / "sweeps" / "cifar10_ablation.yaml")

    whole = load_config(plan.base)
    last = dataclasses.replace(plan.runs[-1].config, train=whole.train)
    assert last == whole  # but for a budget that all share
    assert {run.config.privacy.target_epsilon for run in plan.runs} == {8}
    assert len({examples_of(run.config) for run in plan.runs}) == 1


def examples_of(config: Config) -> float:
    """How many examples a run takes in all, drawn again and again."""
    return config.train.num_steps * config.privacy.expected_batch_size


def changes_along(plan: SweepPlan) -> list[set[str]]:
    """What each run of a ladder sets that the one before it has otherwise."""
    ladder = [config_to_dict(run.config) for run in plan.runs]
    flat = [
        {
            f"{section}.{key}": value
            for section in one
            for key, value in one[section].items()
        }
        for one in ladder
    ]
    return [
        {key for key in after if after[key] != before[key]}
        for before, after in itertools.pairwise(flat)
    ]


def test_each_rung_of_the_ladder_changes_what_it_names() -> None:
    plan = read_sweep(ROOT / "configs" / "sweeps" / "cifar10_ablation.yaml")

    assert changes_along(plan) == [
        {"model.normalization"},
        {
            "privacy.expected_batch_size",
            "train.num_steps",
            "eval.every",  # as many points on the curve
            "optimizer.learning_rate",
        },
        {"model.weight_standardization"},
        {"data.augmentation", "data.augmentation_multiplicity"},
        {"ema.decay"},
    ]


@pytest.mark.parametrize("name", ["cifar10_beyond", "cifar10_beyond_small_batch"])
def test_each_step_beyond_the_paper_changes_what_it_names(name: str) -> None:
    plan = read_sweep(ROOT / "configs" / "sweeps" / f"{name}.yaml")
    account, *others = changes_along(plan)

    assert account <= {"privacy.noise_multiplier", "privacy.target_epsilon"}
    assert others == [
        {"ema.warmup"},
        {"optimizer.schedule", "optimizer.decay_steps", "ema.warmup", "ema.decay"},
        {"data.augmentation_multiplicity"},
        {"data.mixed_views"},
    ]


def test_the_run_beyond_the_paper_is_a_step_of_its_sweep() -> None:
    name = "cifar10_wrn16-4_eps8"
    sweep = read_sweep(ROOT / "configs" / "sweeps" / "cifar10_beyond.yaml")
    (step,) = [run for run in sweep.runs if run.label == "falling rate for it"]
    paper, beyond, run = (
        load_config(path)
        for path in (
            ROOT / "configs" / f"{name}.yaml",
            ROOT / "configs" / f"{name}_beyond.yaml",
            ROOT / "benchmarks" / "results" / f"{name}_beyond_h200" / "config.yaml",
        )
    )

    assert beyond == step.config != paper
    for section in ("model", "privacy", "optimizer", "train"):
        assert getattr(run, section) == getattr(beyond, section)


def test_the_steps_beyond_the_paper_are_simulated_with_their_noise() -> None:
    sweeps = ROOT / "configs" / "sweeps"
    whole = read_sweep(sweeps / "cifar10_beyond.yaml").runs
    small = read_sweep(sweeps / "cifar10_beyond_small_batch.yaml").runs

    assert [run.label for run in small] == [run.label for run in whole]
    for large, run in zip(whole, small, strict=True):
        # Null is calibrated, to 2.56281; six digits of each noise are written down.
        noise = large.config.privacy.noise_multiplier or 2.56281
        assert run.config.privacy.noise_multiplier == pytest.approx(
            noise * 256 / 4096, rel=1e-5
        )
        assert run.config.train == large.config.train


def test_results_are_listed_with_the_settings_of_their_configs() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    rows = re.findall(
        r"^\| WRN-(\d+)-(\d+) \| (\d+) \| ([\d,]+) \|.*\(\.\./(configs/.*)\)",
        text,
        re.M,
    )

    for name in LARGE:
        (row,) = re.findall(rf"^\|.*configs/{name}\.yaml\) \|$", text, re.M)
        steps = load_config(ROOT / "configs" / f"{name}.yaml").train.num_steps
        assert f"| {steps:,} |" in row
        assert "| not run |" in row
    assert {Path(row[-1]).stem for row in rows} == {
        path.stem for path in CONFIGS if path.stem.startswith("cifar10")
    }
    for depth, width, epsilon, steps, name in rows:
        config = load_config(ROOT / name)
        assert config.train.num_steps == int(steps.replace(",", ""))
        assert config.privacy.target_epsilon == int(epsilon)
        assert (config.model.depth, config.model.width) == (int(depth), int(width))


EXPECTED_TIME = re.compile(
    r"about (\d+) (h|min) on one H200, from the ([\d,]+) views/s of .*; not measured",
    re.DOTALL,
)


def test_times_that_are_expected_follow_from_the_speed_beside_them() -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    told = {path: EXPECTED_TIME.search(path.read_text()) for path in CONFIGS}
    found = {path: words for path, words in told.items() if words}

    assert {path.stem for path in found} == {
        *(f"cifar10_wrn16-4_eps{epsilon}" for epsilon in (2, 3, 4, 6)),
        *(f"cifar10_wrn40-4_eps{epsilon}" for epsilon in (1, 2, 3, 4, 6, 8)),
    }
    for path, words in found.items():
        count, unit, speed = words.groups()
        config = load_config(path)
        views = examples_of(config) * config.views_per_unit
        hours = views / int(speed.replace(",", "")) / 3600
        shown = f"{hours:.0f}" if unit == "h" else f"{hours:.1f}"
        assert int(count) == round(hours * (1 if unit == "h" else 60))
        command = f"`bin/dpsgd-train configs/{path.name}`"
        assert f"one H200 | {shown} expected | [{command}](" in results


def test_the_sweep_that_is_explained_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text()
    example = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    (tmp_path / "sweeps").mkdir()
    shutil.copy(ROOT / "configs" / "digits.yaml", tmp_path)
    (tmp_path / "sweeps" / "example.yaml").write_text(example)

    assert len(read_sweep(tmp_path / "sweeps" / "example.yaml").runs) == 12


def commands_of(text: str) -> list[list[str]]:
    """The commands of a document that answer at once, without a run or data."""
    lines = [line.split("#")[0].strip(" `") for line in code_of(text).splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("bin/dpsgd-")]
    return [
        words for words in found if words[0].endswith("privacy") or "--plan" in words
    ]


@pytest.mark.slow
def test_commands_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    mains = {"bin/dpsgd-privacy": privacy.main, "bin/dpsgd-train": train.main}
    commands = commands_of((ROOT / "README.md").read_text())

    assert {words[0] for words in commands} == {*mains}
    with contextlib.chdir(ROOT):
        for name, *arguments in commands:
            assert mains[name](arguments) == 0, capsys.readouterr().err
