"""Guards of the fake-CUDA tests: no module without one, no allocation without a device, no `device=` that may go."""

import ast
import importlib
import inspect
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from fake_cuda import MODE, fake_cuda, fake_denoiser, real_inputs, sent

import segresearch
from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.blur import BOUNDARIES, blur, gaussian_taps
from segresearch.guidance.frequencies import high_pass, smooth
from segresearch.guidance.sag import TAPS
from segresearch.models import to_diffusers

ROOT = Path(segresearch.__file__).parent
PACKAGES = ("checkpoints", "models", "guidance", "sampling", "analysis", "metrics")

# module -> the tests/test_fake_cuda_<name>.py that runs it on the device
COVERED = {
    "models.controlnet_union": "bridge", "models.ip_adapter": "bridge", "checkpoints.ip_adapter_file": "bridge",
    "checkpoints.in_memory": "bridge", "guidance.diffusers_unet": "bridge",
    "checkpoints.lora_merge": "pictures", "checkpoints.textual_inversion": "pictures",
    "checkpoints.folder": "pictures", "checkpoints.load": "pictures", "checkpoints.tensors": "pictures",
    "models.attention": "guidance", "models.layers": "guidance", "models.stable_diffusion": "pictures",
    "models.conditioning": "models", "models.controlnet": "models",
    "models.denoiser": "models", "models.preconditioning": "models",
    "models.calls": "models", "models.tiles": "models", "models.text": "models", "models.prompt_syntax": "models",
    "models.unet": "guidance", "models.vae": "models",
    "guidance.blur": "guidance", "guidance.controlnet_residuals": "models",
    "guidance.guided_denoiser": "guidance", "guidance.row_layout": "guidance", "guidance.conditionings": "guidance",
    "guidance.perturbations": "guidance", "guidance.postprocess": "guidance",
    "guidance.sag": "guidance", "guidance.step": "combination", "guidance.frequencies": "combination",
    "sampling.loop": "sampling", "sampling.noise": "sampling",
    "sampling.schedules": "sampling", "sampling.start": "sampling", "sampling.intervals": "sampling",
    "sampling.consistency": "sampling",
    "sampling.draws": "guidance", "sampling.memory": "guidance",
    "analysis.blur_operator": "analysis", "analysis.claims": "analysis",
    "analysis.energy": "analysis", "analysis.logit_statistics": "analysis", "analysis.measurements": "analysis",
    "analysis.recorder": "analysis", "analysis.attention_diagnostics": "analysis",
    "analysis.branch_diagnostics": "analysis",
    "metrics.features": "metrics", "metrics.frechet": "metrics", "metrics.lpips": "metrics",
    "metrics.mini_vision": "metrics", "metrics.nonparametric": "metrics", "metrics.agreement": "metrics",
    "metrics.text_alignment": "metrics", "metrics.scores": "metrics", "metrics.image_reward": "metrics",
    "metrics.clip_pixels": "metrics", "metrics.open_clip_file": "metrics", "metrics.inception_score": "metrics",
}  # fmt: skip
# module -> why it has no tensor of the device, though it imports torch
HOST = {
    "models.compute": "settings; torch is imported for types",
    "checkpoints.single_file": "what is on disk: sizes and names",
    "analysis.analyze": "the run itself: sampling, decoding and the table, each covered, and files",
    "analysis.energy_plots": "plots of a recording, which lies on the CPU",
}
FACTORIES = {"zeros", "ones", "full", "empty", "eye", "arange", "linspace", "logspace", "tensor", "as_tensor", "rand",
             "randn", "randint", "randperm", "normal", "from_numpy", "tril_indices", "triu_indices"}  # fmt: skip
GENERATED = "drawn on the CPU, so that a seed is the same on every device, then sent"
# module:function -> why what it allocates without a device is of the CPU
ALLOWED = {
    "guidance.blur:gaussian_taps": "fp64 on the CPU; cached as a matrix on the device by its users",
    "guidance.blur:fold_taps": "as gaussian_taps",
    "guidance.blur:_matrix": "fp64 on the CPU, sent once a shape",
    "guidance.methods.icg_text:RandomTokens.tokens": "token ids for text encoders, which send them",
    "models.prompt_syntax:encode_weighted": "token ids for text encoders, which send them",
    "models.ip_adapter:Resampler.__init__": "a parameter, as of any new module; `fill` makes it on the device",
    "models.controlnet_union:ControlNetUnion.__init__": "a parameter, as of any new module",
    "models.controlnet:ControlNet.forward": "weights of guess mode, as numbers",
    "models.denoiser:alphas_cumprod": "numbers of a config in fp64; `scheduled` sends them",
    "models.denoiser:scheduled": "the two numbers of an EDM config in fp64, sent to the device",
    "sampling.loop:sample": "levels as given, sent with the noise",
    "sampling.noise:initial_noise": GENERATED,
    "sampling.noise:white_noise.draw": GENERATED,
    "sampling.noise:brownian_noise": GENERATED, "sampling.noise:tree_end": "a number, rounded",
    "sampling.noise:brownian_noise.draw": "two numbers that have been read",
    "sampling.schedules:positive_sigmas": "fp64 on the CPU, sent as a whole",
    "sampling.schedules:timesteps": "as positive_sigmas", "sampling.schedules:curved": "as positive_sigmas",
    "sampling.intervals:step_interval": "levels as numbers",
    "analysis.blur_operator:log_spectrum": "small fp64 vectors of a grid, whose sums are numbers of the host",
    "analysis.logit_statistics:end_weights": "of a grid alone; sent by whoever has a device",
    "analysis.claims:white_noise": GENERATED,
    "analysis.energy_plots:_column": "a plot, on the CPU",
    "analysis.energy_plots:landscape": "a plot, on the CPU",
    "metrics.agreement:scene_attributes": "of numbers of scenes, on the CPU",
    "metrics.agreement:contrast": "two 3×3 kernels, sent to the pictures",
    "metrics.clip_pixels:cropped_squares": "pixels that Pillow has resized, sent to where the images lie",
    "metrics.inception_score:inception_scores": "one fixed order, sent part by part",
    "metrics.frechet:bootstrap_indices": GENERATED,
    "metrics.frechet:frechet_distance": "numbers",
    "metrics.nonparametric:subset_indices": GENERATED,
    "metrics.nonparametric:kid": "numbers",
}


@lru_cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages that imports torch, parsed."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            if any(name.partition(".")[0] == "torch" for name in imported) and path.stem != "__init__":
                found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = tree
    return found


def without_device(tree: ast.AST, inside: str = "") -> list[str]:
    """The functions in which a factory of torch is called without `device=`, once for each call."""
    found = []
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        place = f"{inside}.{node.name}".lstrip(".") if named else inside
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not any(word.arg in ("device", None) for word in node.keywords):
                found.append(place)
        found += without_device(node, place)
    return found


def test_every_module_with_tensors_has_its_test():
    methods = {module for module in modules() if module.startswith("guidance.methods.")}  # every config runs there
    lacking = sorted(set(modules()) - methods - set(COVERED) - set(HOST))
    assert not lacking, f"{lacking}: run on the device in tests/test_fake_cuda_*.py, then name the test in COVERED"
    assert not set(COVERED) & set(HOST)
    for module, name in COVERED.items():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        assert (Path(__file__).parent / f"test_fake_cuda_{name}.py").is_file(), name


def test_nothing_is_allocated_without_a_device():
    found = {f"{module}:{place}" for module, tree in modules().items() for place in without_device(tree)}
    assert not found - set(ALLOWED), "give it the device of its neighbours, or say in ALLOWED why it is of the CPU"
    assert len(found) > 10  # the search sees calls


def test_factories_are_called_by_their_full_names():
    """`from torch import zeros` would hide an allocation from the test above."""
    for module, tree in modules().items():
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "torch"]
        assert not {a.name for n in imports for a in n.names} & FACTORIES, module


def test_the_search_sees_a_new_perturbation():
    source = "class New:\n    def __call__(self, q, k, v, site, attend):\n        return v * torch.ones(3)\n"
    assert without_device(ast.parse(source)) == ["New.__call__"]
    assert not any(place.startswith("guidance.perturbations") for place in ALLOWED)


# --- every `device=` of guidance is needed ------------------------------------------------------------


def everything() -> None:
    """What uses each of them: a mask of heads, a blur, two branches of a fork, SAG, rows with scales of their own."""
    x, _, conds = sent(real_inputs())
    sigma = torch.tensor([3.0, 1.0], device="cuda")
    terms = {"cfg": cfg(3.0, interval=(2.0, 9.0)), "seg": perturbed("seg", [SEG(1.0, heads=[1]), PAG(heads=[0])], 2.0)}
    model = GuidedDenoiser(fake_denoiser(), terms, rescale=0.7)
    SelfAttentionGuidance(model, lambda s: s / 4, base="cond")(x, sigma, conds)
    rows, added = x.repeat(2, 1, 1, 1), {"text_embeds": "pooled", "time_ids": "time_ids"}
    both = {key: torch.cat([getattr(c, key) for c in conds.values()]) for key in ("context", *added.values())}
    added = {key: both[name] for key, name in added.items()}
    to_diffusers(model)(rows, 500, both["context"], added_cond_kwargs=added)
    with pytest.MonkeyPatch.context() as patch:  # compiled code makes every matrix where it is used, at each call
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        z = torch.ones(1, 1, 48, 2, device="cuda")
        MODE.sends = []
        for boundary in BOUNDARIES:
            blur(z, (6, 8), 1.0, boundary)
        image = torch.ones(1, 1, 6, 8, device="cuda")
        smooth(image), high_pass(image, 0.05)
        if MODE.sends:
            raise RuntimeError("not on the same device: compiled code sends a matrix at each call")


def code_of(module, name: str):
    """The function of this dotted name behind its decorators, whose code can be exchanged."""
    found = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found


def compiled(tree: ast.Module, name: str, like):
    """The code of one function of a changed module."""
    code = compile(ast.fix_missing_locations(tree), like.co_filename, "exec")
    for part in name.split("."):
        code = next(c for c in code.co_consts if inspect.iscode(c) and c.co_name == part)
    return code


def mutations() -> list[tuple[str, str, int]]:
    """(module, outermost function, which of its devices) for each `device=` and {"device": ...} in guidance."""
    found = []
    for path in sorted((ROOT / "guidance").glob("*.py")):
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            name, node = function
            found += [(path.stem, name, i) for i in range(len(devices(node)))]
    return found


def functions(tree: ast.AST, inside: str = "") -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found.append((f"{inside}{node.name}", node))
        elif isinstance(node, ast.ClassDef):
            found += functions(node, f"{inside}{node.name}.")
    return found


def devices(node: ast.AST) -> list[ast.Call | ast.Dict]:
    """Calls with `device=`, and dictionaries of such arguments."""
    found: list[ast.Call | ast.Dict] = []
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and any(word.arg == "device" for word in part.keywords):
            found.append(part)
        if isinstance(part, ast.Dict) and any(isinstance(k, ast.Constant) and k.value == "device" for k in part.keys):
            found.append(part)
    return found


def remove_device(part: ast.Call | ast.Dict) -> None:
    if isinstance(part, ast.Dict):
        kept = [i for i, key in enumerate(part.keys) if not (isinstance(key, ast.Constant) and key.value == "device")]
        part.keys, part.values = [part.keys[i] for i in kept], [part.values[i] for i in kept]
        return
    part.keywords = [word for word in part.keywords if word.arg != "device"]
    if not part.args and not part.keywords:  # `.to()` is not a call
        part.args = [ast.Constant("cpu")]


@pytest.mark.parametrize("module, name, which", mutations())
def test_no_device_of_guidance_can_be_removed(monkeypatch, module, name, which):
    tree = ast.parse((ROOT / "guidance" / f"{module}.py").read_text(encoding="utf-8"))
    node = dict(functions(tree))[name]
    remove_device(devices(node)[which])
    function = code_of(importlib.import_module(f"segresearch.guidance.{module}"), name)
    monkeypatch.setattr(function, "__code__", compiled(tree, name, function.__code__))
    with fake_cuda(), pytest.raises((RuntimeError, KeyError), match="device|an index on the cpu"):
        everything()


def test_the_blur_of_sag_on_the_cpu_fails(monkeypatch):
    """What once stopped every run with SAG on a GPU: taps on the device, folded into a matrix on the CPU."""

    def folded(taps, n):
        at = torch.arange(n)[:, None] + torch.arange(len(taps)) - len(taps) // 2
        period = 2 * n - 2
        source = torch.where(at % period < n, at % period, period - at % period)
        return torch.zeros(n, n, dtype=taps.dtype).scatter_add_(1, source, taps.expand(n, len(taps)))

    def degrade(self, plain, mask):
        h, w = plain.shape[2:]
        taps = gaussian_taps(self.blur_sigma, TAPS).to(plain)
        return folded(taps, h) @ plain @ folded(taps, w).T

    with fake_cuda():
        everything()
    monkeypatch.setattr(SelfAttentionGuidance, "degrade", degrade)
    with fake_cuda(), pytest.raises(RuntimeError, match="same device"):
        everything()
