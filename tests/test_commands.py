"""`segresearch COMMAND`: every command is there, outside the repository too; signals, pipes and poor terminals."""

import os
import pickle
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segresearch import __main__ as entry
from segresearch import commands, measure
from segresearch.cli import explained
from segresearch.config import help as help_text
from segresearch.errors import Ended, NotFinite, Stopped
from segresearch.evaluation.shards import Damaged
from segresearch.rounding import rounded

ROOT = Path(entry.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What pyproject.toml puts into the wheel, as `pip install --target` lays it out."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path_factory.mktemp("site")
    (site / "segresearch").mkdir()
    for name in wheel["only-include"]:
        to = wheel["sources"].get(name, name)
        if to == name:
            for path in (ROOT / name).iterdir():
                (site / name / path.name).symlink_to(path) if path.is_dir() else (site / name / path.name).write_bytes(
                    path.read_bytes()
                )
        else:
            (site / to).symlink_to(ROOT / name)
    config = site / "segresearch" / "config"
    files = {path.name: path.read_bytes() for path in config.glob("*.py")}
    config.unlink()  # a copy: conf_dir looks beside the file itself
    config.mkdir()
    for name, data in files.items():
        (config / name).write_bytes(data)
    return site


def run(installed, folder, *arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-P", "-m", "segresearch", *arguments], cwd=folder, env=env,
                          capture_output=True, text=True)  # fmt: skip


@pytest.mark.slow
def test_the_wheel_holds_the_configs_and_makes_an_image_outside_the_repository(installed, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"segresearch": "segresearch.__main__:main"}
    assert (ROOT / "segresearch" / "py.typed").is_file()
    (tmp_path / "mine.py").write_text("def halved(q, k, v, site, attend):\n    return attend(q / 2, k, v, site)\n")
    target = "guidance.terms.custom.perturbation.target=mine.halved"
    done = run(installed, tmp_path, "generate", "guidance=custom", target, "seeds=0", "steps=1", "device=cpu")
    assert done.returncode == 0 and len([*tmp_path.glob("runs/generate/*/images/*/*.png")]) == 1, done.stderr


def test_every_command_is_a_function_and_others_are_one_line(capsys, monkeypatch):
    for name in entry.COMMANDS.keys() - {*entry.MEASURES}:
        assert callable(getattr(commands, name.replace("-", "_")))
    monkeypatch.setattr(sys, "argv", ["segresearch", "genrate"])
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: genrate: no such command; did you mean generate?\n"
    monkeypatch.setattr(sys, "argv", ["segresearch"])
    entry.main()
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in entry.COMMANDS)


def leaves(node, at=""):
    """Every key of a config, by its full name."""
    for key, value in node.items():
        if at + key != "defaults":
            yield at + key
            yield from leaves(value, f"{at}{key}.") if isinstance(value, dict) else ()


def test_help_names_what_a_command_takes_and_explains_every_key():
    generate, evaluate = help_text.groups("generate"), help_text.groups("evaluate")
    assert "  super_resolution  Restoration" in generate
    assert "    demo " in generate and "    demo " not in evaluate and "    table1 " in evaluate
    assert "experiment" not in help_text.groups("analyze") and "controlnet" not in help_text.groups("analyze")
    for name in ("generate", "evaluate", "analyze"):
        text = (ROOT / "conf" / f"{name}.yaml").read_text().partition("\nhydra:")[0]
        written = list(leaves(OmegaConf.to_container(OmegaConf.create(text))))
        explained = {line.split()[0] for line in help_text.settings(name).splitlines()}
        for key in written:
            parents = {key.rpartition(".")[0]} & {"weights", "checksums"}  # files by the name of a network
            assert key in explained or parents, f"conf/{name}.yaml: {key} has no comment"
        assert {"wandb.tags", "text.negative_aesthetic_score", "sampler.options", "schedule.rho"} <= explained
        model = OmegaConf.load(ROOT / "conf" / "model" / "sdxl.yaml")
        assert {f"model.{key}" for key in model} <= explained
        assert ("guidance.rescale" in explained) == (name != "analyze")


def test_models_lists_configs_and_the_cache(tmp_path, call):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    broken = tmp_path / "hub" / "models--org--odd" / "snapshots" / "1"
    broken.mkdir(parents=True)
    (broken / "model_index.json").write_text("[" * 9000)
    code, said = call(commands.models, "--cache", tmp_path / "hub")
    assert code == 0 and "  mini " in said.out and "org/name " in said.out and "StableDiffusionXLPipeline" in said.out
    assert "cannot be read" in said.out


@pytest.mark.parametrize("error", [Ended(5, "no room"), NotFinite("nan"), Damaged(Path("a.safetensors"), "damaged")])
def test_errors_cross_a_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.code == error.code
    assert explained(again) == explained(error)


WAITING = """
import signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup it would be inherited as ignored
from segresearch.cli import one_line_errors
with one_line_errors():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("kept", flush=True)
        raise
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_a_run_as_an_interrupt_does(name):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WAITING], env=env, **pipes)
    assert process.stdout.readline() == "ready\n"
    number = getattr(signal, name)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == "kept\n" and err == f"error: stopped by {name}; the same command resumes\n"
    assert process.returncode == 128 + number == Stopped(number, name).code


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from segresearch.cli import stoppable

        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


PRINTING = """
from segresearch.cli import one_line_errors
with one_line_errors():
    for _ in range(100_000):
        print("\u03c3 = \u221e")
"""


def test_a_closed_pipe_and_an_ascii_terminal():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", PRINTING], env=env, **pipes)
    assert process.stdout.readline() == b"\\u03c3 = \\u221e\n"
    process.stdout.close()
    assert process.wait(20) == 141 and process.stderr.read() == b""


@pytest.mark.parametrize(
    "words", [["--help"], ["fid", "--help"], ["overview", "--help"], ["generate", "--help"], ["models"]], ids=" ".join
)
def test_every_script_bears_a_closed_pipe_and_an_ascii_terminal(words, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    env.pop("PYTHONUNBUFFERED", None)  # with it argparse itself passes over a closed pipe, and ends with 0
    call = [sys.executable, "-m", "segresearch", *words]
    done = subprocess.run(call, env=env, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.isascii() and done.stdout
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(call, env=env, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.returncode == 141 and done.stderr == b""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of scenes of mini, 24 and 20 images; the second in other colours."""
    from segresearch.sample_images import save_images
    from segresearch.scenes.scenes import scenes

    root = tmp_path_factory.mktemp("images")
    images = scenes(range(24)).images
    save_images(images, root / "a")
    save_images(images[:20].flip(1), root / "b")
    save_images(images[:3], root / "few")
    return root


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("fid", ("a", "b", "--features", "mini", "--force", "--bootstrap", 3), "(N = 24 against 20, "),
        ("kid", ("a", "b", "--features", "mini", "--subsets", 4), "(N = 24 against 20, 4 subsets of 10)"),
        ("prdc", ("a", "b", "--features", "mini"), "coverage "),
        ("lpips", ("a", "a", "--net", "mini"), "LPIPS-mini 0.0000 ± 0.0000 (N = 24)"),
    ],
)
def test_two_folders_are_measured_with_n_errors_and_the_resizing(name, arguments, words, folders, call, monkeypatch):
    given = [folders / a if a in ("a", "b") else a for a in arguments]
    monkeypatch.setattr(sys, "argv", [])
    code, said = call(lambda: measure.main(name), *given, "--device", "cpu")
    assert code == 0 and words in said.out and "not resized; network mini, weights " in said.out, said
    if name == "fid":
        assert "biased far upwards" in said.out and " ± " in said.out


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("fid", ("a", "b", "--features", "mini"), "20 images for 256 features"),
        ("lpips", ("a", "b", "--net", "mini"), "not the same names (seed20.png"),
        ("clip", ("a",), "no prompt in a record"),
        ("score", ("a",), "no prompt in a record"),
        ("score", ("a", "--by", "aesthetic", "--weights", "none.pth"), "none.pth: no such file; download https://"),
        ("is", ("few",), "few: 3 images; the inception score needs 10"),
        ("is", ("a", "--weights", "none.pth"), "none.pth: no such file; download https://"),
        ("kid", ("a", "nowhere"), "nowhere: no such folder"),
        ("kid", ("few", "a", "--features", "mini"), "3 and 24 images; a kernel distance needs four of each"),
        ("fid", ("a", "b", "--bootstrap", -3), "--bootstrap: '-3' is not a whole number from 0 to"),
        ("kid", ("a", "b", "--subsets", 0), "--subsets: '0' is not a whole number from 1 to"),
        ("prdc", ("a", "b", "--neighbour", "x"), "--neighbour: 'x' is not a whole number from 1 to"),
        ("fid", ("a",), "required: B; "),
        ("lpips", ("a", "b", "--nett", "mini"), "unrecognized arguments: --nett mini; "),
    ],
)
def test_folders_that_cannot_be_compared_are_one_line(name, arguments, words, folders, call):
    given = [folders / a if a in ("a", "b", "few") else a for a in arguments]
    code, said = call(lambda: measure.main(name), *given, "--device", "cpu")
    assert code == (3 if "no such file" in words else 2) and said.out == "", said
    assert words in said.err and said.err.count("\n") == 1, said


@pytest.mark.filterwarnings("ignore:CLIP reads 16 tokens")
def test_images_are_scored_with_the_prompts_of_a_file(folders, call, tmp_path):
    from score_files import TOKENIZER, clip_folder

    from segresearch.metrics.scores import load_scorer
    from segresearch.scenes.scenes import captions, scenes

    clip_folder(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("\n".join(captions(range(3))))
    _, said = call(lambda: measure.main("score"), folders / "few", tmp_path / "prompts.txt", "--by", "pickscore",
                   "--weights", tmp_path / "clip", "--beside", TOKENIZER, "--device", "cpu")  # fmt: skip
    values = load_scorer("pickscore", tmp_path / "clip", TOKENIZER).of(scenes(range(3)).images, captions(range(3)))
    mean, error = values.mean().item(), values.std().item() / 3**0.5
    assert said.out.startswith(f"pickscore {rounded(mean, error, 4)} (N = 3)\nthe shorter side to 224"), said
    assert error > 0


def test_the_command_agrees_with_the_metric(folders, call):
    import torch

    from segresearch.metrics.features import load_extractor
    from segresearch.metrics.frechet import frechet_distance, gaussian
    from segresearch.metrics.nonparametric import density_coverage
    from segresearch.scenes.scenes import scenes

    extractor, images = load_extractor("mini"), scenes(range(24)).images
    order = sorted(range(24), key=lambda i: f"seed{i}.png")
    a, b = extractor.of(images[order]), extractor.of(images[:20].flip(1))
    expected = frechet_distance(a, gaussian(b, True), 0, True).distance
    _, said = call(lambda: measure.main("fid"), folders / "a", folders / "b", "--features", "mini", "--force",
                   "--bootstrap", 0, "--device", "cpu")  # fmt: skip
    assert float(said.out.split()[1]) == pytest.approx(expected, rel=1e-3)
    assert density_coverage(b, b, 5) == (pytest.approx(6 / 5), 1.0)  # each ball holds its 5 neighbours and its centre
    x = torch.tensor([[0.0], [10.0]])
    y = torch.tensor([[0.0], [1.0], [2.0], [9.9]])
    assert density_coverage(x, y, 1) == (pytest.approx(3 / 2), 3 / 4)  # 0 in two balls, 10 in one; 2's ball is empty


@pytest.mark.parametrize("name", ["fig7", "fig99"])
def test_a_figure_without_an_experiment_names_those_that_have_one(name, call):
    code, said = call(commands.generate, f"experiment={name}")
    assert code == 2 and said.err.count("\n") == 1 and f"{name} of arXiv 2408.00760 has no experiment" in said.err
    assert "fig5 (fig8, fig9 too)" in said.err and "fig12" in said.err and "table1" in said.err
    assert "demo" not in said.err


@pytest.mark.parametrize("name", ["overview", "reproduce", "dashboard", "models", "train_mini"])
def test_arguments_that_are_wrong_are_one_line(name, call):
    for arguments in (("--no-such-option", "x", "y", "z"), ("train", "--no-such-option")[: 2 * (name == "train_mini")]):
        if arguments:
            code, said = call(getattr(commands, name), *arguments)
            assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1 and "--help" in said.err


def test_places_that_cannot_be_are_refused_before_any_work(call, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    cases = [
        (commands.reproduce, ("a.png", "--save", "a.jpg"), "--save a.jpg: what is written is a PNG"),
        (commands.reproduce, ("a.png", "--save", "./a.png"), "--save a.png: the image itself"),
        (commands.reproduce, ("a.png", "--save", "."), "--save .: a folder"),
        (commands.overview, ("--out", "nosuch"), "nosuch: no such folder"),
        (commands.models, ("--cache", "a.png"), "a.png: no such folder"),
    ]
    for main, arguments, words in cases:
        code, said = call(main, *arguments)
        assert code == 2 and words in said.err and said.err.count("\n") == 1


def test_a_closed_output_is_no_error(tmp_path):
    """As of daemons: `command >&-`."""
    call = [sys.executable, "-m", "segresearch", "models"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *call], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stderr == ""


def test_precision_and_density_have_neighbours_of_their_own(folders, call):
    arguments = (folders / "a", folders / "b", "--features", "mini", "--device", "cpu")
    assert "k = 3 and 5" in call(lambda: measure.main("prdc"), *arguments)[1].out
    assert "k = 2 and 2" in call(lambda: measure.main("prdc"), *arguments, "--neighbour", 2)[1].out


def test_a_perturbation_in_the_current_folder_is_found_without_pythonpath(tmp_path, monkeypatch):
    from segresearch.config.build import imported

    code = "def halved(q, k, v, site, attend):\n    return attend(q / 2, k, v, site)\n"
    (tmp_path / "my_own_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert imported("my_own_module.halved", "guidance").__name__ == "halved"
    assert sys.path[-1] == str(tmp_path)  # behind all packages
    sys.modules.pop("my_own_module")


@pytest.mark.parametrize(("figure", "experiment"), [("fig8", "fig5"), ("fig11", "fig4"), ("fig17", "fig15")])
def test_figures_that_show_what_another_shows_are_named(figure, experiment, call):
    code, said = call(commands.generate, f"experiment={figure}")
    assert code == 2 and f"take experiment={experiment}" in said.err and said.err.count("\n") == 1
