"""How networks compute: arithmetic, what enters identities, compiled and captured calls as far as a CPU can tell."""

import dataclasses
import functools
import math
from contextlib import nullcontext

import pytest
import torch
from guidance_models import denoiser, noisy

from segresearch.config import typed
from segresearch.errors import ConfigError, InputError
from segresearch.guidance import PAG, SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models.calls import Graph, Graphs, NotCapturable, Runner, rebuilt, refuse_state, structure
from segresearch.models.compute import Compute, arithmetic
from segresearch.models.denoiser import Denoiser

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision, flags", [("exact", (False, False)), ("fast", (False, True))])
def test_arithmetic_holds_for_the_block_alone(precision, flags):
    before = tf32()
    with pytest.raises(KeyError), arithmetic(precision, GPU):
        assert tf32() == flags
        raise KeyError
    assert tf32() == before
    with arithmetic(precision, CPU):
        assert tf32() == before


@pytest.mark.parametrize(
    "compute, device, identity",
    [
        (Compute(), "cpu", {}),
        (Compute(), "cuda:1", {"precision": "fast"}),
        (Compute(precision="exact", offload=True), "cuda", {}),
        (Compute(precision="fast", graph=True), "cpu", {}),
        (Compute(compile=True, vae_tile=512), "cpu", {"compile": True, "vae_tile": 512}),
        (Compute("exact", graph=True, compile=True), "cuda", {"graph": True, "compile": True}),
    ],
)
def test_the_identity_is_what_differs_from_the_plain_way(compute, device, identity):
    assert compute.identity(device) == ({"compute": identity} if identity else {})


@pytest.mark.parametrize("values", [{"precision": "tf32"}, {"vae_tile": 32}, {"graph": 1}, {"graphs": True}])
def test_settings_that_cannot_be_are_refused(values):
    with pytest.raises(ConfigError, match=f"compute.{next(iter(values))}"):
        typed(Compute, values, "compute")


@pytest.mark.parametrize("values", [{"graph": 1}, {"offload": "false"}, {"vae_tile": 64.5}, {"vae_tile": "128"}])
def test_values_of_another_type_are_refused(values):
    compute, ((name, value),) = Compute(), values.items()
    object.__setattr__(compute, name, value)  # past the check of types that the tests add
    with pytest.raises(InputError, match=f"compute.{name}="):
        compute.__post_init__()


def test_the_record_is_of_what_acts():
    record = Compute(graph=True, vae_tile=512).record("cuda:1")
    assert (record["device"], record["precision"], record["graph"], record["vae_tile"]) == ("cuda", "fast", True, 512)
    record = Compute(graph=True, precision="fast").record("cpu")
    assert (record["device"], record["precision"], record["graph"]) == ("cpu", "exact", False)


# --- structures of calls -------------------------------------------------------------------------------


def seg_call(sigma: float = 1.0, rows: int = 2) -> tuple:
    """What a guided denoiser hands to the plain one: x, sigma and everything else."""
    handed = []

    def inner(x, sigma, **rest):
        handed.append((x, sigma, *rest.values()))
        return denoiser()(x, sigma, **rest)

    inner.unet = denoiser().unet
    x, level, conds = noisy(rows)
    model = GuidedDenoiser(inner, {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(sigma), 1.0)})
    model(x, level, **model.prepare({"conds": conds}))
    return handed[0]


def test_calls_of_one_kind_have_one_key():
    first, again = structure(seg_call()), structure(seg_call())
    assert first.key == again.key and hash(first.key) == hash(again.key)
    assert len({first.key, structure(seg_call(2.0)).key, structure(seg_call(rows=1)).key}) == 3


def test_a_call_is_rebuilt_around_other_tensors():
    call = seg_call()
    own = structure(call)
    copies = []
    again = rebuilt(call, lambda tensor: copies.append(tensor.clone()) or copies[-1])
    assert structure(again).key == own.key
    assert all(a is b for a, b in zip(structure(again).tensors, copies, strict=True))
    x0 = denoiser()(*again)
    torch.testing.assert_close(x0, denoiser()(*call[:2], *call[2:]), rtol=0, atol=0)


def test_what_may_keep_a_state_is_not_captured():
    seen = []
    recorder = lambda q, k, v, site: seen.append(q)  # noqa: E731
    for value in (recorder, seen.append, {"attend": [recorder]}, functools.partial(recorder, 1), object()):
        with pytest.raises(NotCapturable):
            structure(value)
    assert structure((math.sqrt, functools.partial(math.pow, 2.0), tf32, PAG())).tensors == []


@dataclasses.dataclass(frozen=True)
class Notes:
    """Looks like a value, and takes notes."""

    seen: list

    def __call__(self, q, k, v, site):
        self.seen.append(q)
        return v


@dataclasses.dataclass(frozen=True)
class Hidden:
    scale: float

    def __post_init__(self):
        object.__setattr__(self, "seen", [])


def test_a_frozen_dataclass_that_can_take_notes_is_not_captured():
    for value in (Notes([]), Hidden(1.0)):
        with pytest.raises(NotCapturable):
            structure(value)
    space: dict = {"__name__": "nowhere"}
    exec("def outer():\n    seen = []\n    def inner(q): seen.append(q)\n    return inner", space)
    with pytest.raises(NotCapturable):
        structure(space["outer"]())


def test_a_network_that_was_moved_is_another():
    net = torch.nn.Linear(2, 2)
    before = structure(net).key
    assert structure(net).key == before
    net.half()
    assert structure(net).key != before


def test_a_graph_runs_where_there_is_a_gpu_and_gradients_are_off():
    with pytest.raises(NotCapturable, match="on cpu"):
        refuse_state([torch.zeros(1)])
    calls = Graphs()
    with pytest.warns(UserWarning, match="compute.graph: a call runs without a CUDA graph: its tensors are on cpu"):
        assert calls(torch.add, torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert not calls.graphs
    assert calls(torch.add, torch.ones(2), torch.ones(2)).tolist() == [2, 2]  # said once


class Replay:
    """Stands for a captured kernel: result = 2 · static."""

    def __init__(self, static: torch.Tensor, result: torch.Tensor):
        self.static, self.result = static, result

    def replay(self) -> None:
        torch.mul(self.static, 2, out=self.result)


def test_a_replay_copies_what_is_new_and_hands_out_a_copy():
    static, result, source = torch.zeros(2), torch.zeros(2), torch.ones(2)
    graph = Graph(Replay(static, result), (static,), [(static, -1)], {"out": result}, ())
    first = graph([source])["out"]
    assert first.tolist() == [2, 2] and static.tolist() == [1, 1]
    static.fill_(5)  # not copied again, for the source is the same
    assert graph([source])["out"].tolist() == [10, 10]
    source.add_(1)  # a change in place is new
    assert graph([source])["out"].tolist() == [4, 4]
    assert graph([torch.full((2,), 7.0)])["out"].tolist() == [14, 14]
    assert first.tolist() == [2, 2]


def test_graphs_are_bounded_and_freed(monkeypatch):
    monkeypatch.setattr("segresearch.models.calls.refuse_state", lambda tensors: None)

    class Doubles(Graphs):
        def capture(self, function, args, tensors):
            static, result = tensors[0].clone(), tensors[0].clone()
            return Graph(Replay(static, result), (static,), [(static, -1)], result, ())

    calls = Doubles(limit=2)
    for size in (1, 2, 1, 3):
        assert calls(torch.mul, torch.ones(size)).tolist() == [2] * size
    assert len(calls.graphs) == 2
    assert {graph.static[0].shape[0] for graph in calls.graphs.values()} == {1, 3}  # the oldest replay went
    calls.clear()
    assert not calls.graphs and calls.pool is None


def test_a_failed_capture_is_not_tried_again(monkeypatch):
    monkeypatch.setattr("segresearch.models.calls.refuse_state", lambda tensors: None)
    tries = []

    class Fails(Graphs):
        def capture(self, function, args, tensors):
            tries.append(1)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    calls = Fails()
    with pytest.warns(UserWarning, match="the capture failed: operation not permitted when stream is capturing"):
        assert calls(torch.neg, torch.ones(1)).item() == -1
    assert calls(torch.neg, torch.ones(1)).item() == -1 and tries == [1]


# --- the runner -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [Compute(), Compute(precision="fast"), Compute(graph=True)])
def test_every_way_gives_the_same_on_a_cpu(compute):
    plain, (x, sigma, conds) = denoiser(), noisy(2)
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(math.inf), 1.0)}
    expected = GuidedDenoiser(plain, terms)(x, sigma, conds)
    own = Denoiser(plain.unet, plain.alphas, compute=compute)
    with pytest.warns(UserWarning, match="without a CUDA graph") if compute.graph else nullcontext():
        assert torch.equal(GuidedDenoiser(own, terms)(x, sigma, conds), expected)


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    failing = torch.nn.Linear(2, 2).requires_grad_(False)

    def broken(net, **options):
        def call(*args):
            raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    run, x = Runner(Compute(compile=True)), torch.ones(1, 2)
    with pytest.warns(UserWarning, match="compute.compile: Linear runs uncompiled"):
        out = run(lambda net, x: net(x), failing, x)
    assert torch.equal(out, failing(x))
    assert torch.equal(run(lambda net, x: net(x), failing, x), out)


def test_more_variants_than_a_compiler_takes_run_as_they_are(monkeypatch):
    net = torch.nn.Linear(2, 2).requires_grad_(False)

    class FailOnRecompileLimitHit(Exception):
        __module__ = "torch._dynamo.exc"

    def limited(net, **options):
        def call(*args):
            raise FailOnRecompileLimitHit("recompile_limit reached")

        return call

    monkeypatch.setattr(torch, "compile", limited)
    run, x = Runner(Compute(compile=True)), torch.ones(1, 2)
    with pytest.warns(UserWarning, match="runs uncompiled: recompile_limit reached"):
        assert torch.equal(run(lambda net, x: net(x), net, x), net(x))


def test_a_call_that_is_watched_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, **options: pytest.fail("compiled"))
    seen = []
    run, net = Runner(Compute(compile=True)), torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.warns(UserWarning, match="compute.compile: a call runs uncompiled: .* may keep a state"):
        run(lambda net, x, note: note(net(x)), net, torch.ones(1, 2), seen.append)
    assert len(seen) == 1


def test_a_defect_of_a_network_is_no_matter_of_the_compiler(monkeypatch):
    def broken(net, **options):
        def call(*args):
            raise KeyError("a defect")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(KeyError, match="a defect"):
        Runner(Compute(compile=True))(lambda net, x: net(x), torch.nn.Linear(2, 2), torch.ones(1, 2))


def test_prepared_conditionings_cannot_be_changed():
    x, sigma, conds = noisy(2)
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(3.0)})
    prepared = model.prepare({"conds": conds})["conds"]
    with pytest.raises(TypeError):
        prepared["cond"] = conds["uncond"]
    assert prepared.joined(["cond", "uncond"], 2) is prepared.joined(["cond", "uncond"], 2)
    torch.testing.assert_close(model(x, sigma, prepared), model(x, sigma, conds), rtol=0, atol=1e-12)


def test_frozen_settings():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Compute().graph = True  # type: ignore[misc]
