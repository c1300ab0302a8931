"""The fused kernels against their references, for outputs and every gradient.

Without a GPU they run in Triton's interpreter; on a GPU the same tests run compiled, fp64 apart. Uninitialised memory
is filled with NaN throughout, so that whatever a kernel leaves unwritten shows.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sega_dist.config import Config, DataConfig, GeneratorConfig
from sega_dist.kernels import backend, bias_act, compat, conv3x3_act, idb, rals, ridb, upconv_act
from sega_dist.networks.build import build_generator
from sega_dist.networks.generator import ResidualInternalDenseBlock

pytestmark = pytest.mark.kernels

DEVICE = "cpu" if compat.IS_INTERPRETING else "cuda"
FAST = ["triton", "hybrid"]
needs_fp64 = pytest.mark.skipif(not compat.IS_INTERPRETING, reason="kernels in fp64 need the interpreter")
WIDEST = torch.float64 if compat.IS_INTERPRETING else torch.float32
# Relative error in the norm; fp32 without TF32. In bf16 the interpreter truncates where it should round.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised memory is NaN (and the largest integer), and only deterministic algorithms are allowed."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = tf32


def draw(*shape: int, dtype: torch.dtype = WIDEST, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm, both in fp64."""
    found, expected = found.double(), expected.double()
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def same(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], tolerance: float | None = None
) -> None:
    """Output and every gradient of `fast(*inputs)` are those of the reference in fp64."""
    y = fast(*inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact)
    assert y.shape == expected.shape
    limit = tolerance or TOLERANCE[y.dtype]
    assert error(y, expected) <= limit
    g = torch.randn_like(expected).to(y.dtype)
    gradients = torch.autograd.grad(y, inputs, g)
    for i, (found, wanted) in enumerate(zip(gradients, torch.autograd.grad(expected, exact, g.double()), strict=True)):
        assert found.dtype == inputs[i].dtype
        assert error(found, wanted) <= limit, f"gradient of input {i}, {tuple(inputs[i].shape)}"


def filters(channels: int, blocks: int, dtype: torch.dtype = WIDEST) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of a RIDB, of a size that keeps activations near one."""
    inputs = [channels, 2 * channels] * blocks + [channels]
    weights = [draw(channels, ci, 3, 3, dtype=dtype, scale=0.5 / math.sqrt(9 * ci)) for ci in inputs]
    return weights, [draw(channels, dtype=dtype, scale=0.3) for _ in weights]


def ridb_of(impl: str, blocks: int, slope: float = 0.2, beta: float = 0.3) -> Callable[..., Tensor]:
    count = 2 * blocks + 1
    if impl == "reference":
        return lambda r, *p: ridb.reference(r, p[:count], p[count:], slope, beta)
    return lambda r, *p: ridb.ridb(r, p[:count], p[count:], slope, beta, impl)


# Each op -----------------------------------------------------------------------------------------------------------


CASES = [  # channels of both sources and of the output, slope, scale, add_sources, residual, bias
    (16, 0, 16, 0.2, 1.0, False, False, True),
    (16, 16, 16, 0.2, 1.0, True, True, True),
    (32, 16, 32, 0.2, 0.5, False, True, True),
    (16, 0, 16, 1.0, 0.2, False, True, True),
    (16, 0, 16, 0.2, -1.0, False, False, False),
    (16, 16, 16, 0.0, 2.0, True, False, False),
    (64, 64, 64, 0.2, 1.0, True, True, True),
]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("c0", "c1", "co", "slope", "scale", "add", "has_res", "has_bias"), CASES)
def test_conv3x3_act(impl: str, c0: int, c1: int, co: int, slope: float, scale: float, add: bool, has_res: bool,
                     has_bias: bool):  # fmt: skip
    shapes = {"x0": (2, c0, 5, 9), "x1": (2, c1, 5, 9), "weight": (co, c0 + c1, 3, 3), "bias": (co,),
              "res": (2, co, 5, 9)}  # fmt: skip
    absent = {"x1": not c1, "res": not has_res, "bias": not has_bias}
    names = [name for name in shapes if not absent.get(name)]

    def run(op: Callable[..., Tensor], *extra: object) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            return op(*(given.get(name) for name in shapes), slope, scale, add, *extra)

        return call

    same(run(conv3x3_act.conv3x3_act, impl), run(conv3x3_act.reference), [draw(*shapes[name]) for name in names])


@pytest.mark.parametrize(("addends", "slope", "scale"), [(0, 0.2, 1.0), (2, 0.2, 0.5), (3, 0.01, 1.0), (0, 0.0, -1.0)])
def test_bias_act(addends: int, slope: float, scale: float):
    inputs = [draw(2, 48, 5, 7), draw(48), *(draw(2, 48, 5, 7) for _ in range(addends))]
    same(lambda z, b, *a: bias_act.bias_act(z, b, a, slope, scale, "triton"),
         lambda z, b, *a: bias_act.reference(z, b, a, slope, scale), inputs)  # fmt: skip


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("size", [(5, 9), (8, 8), (1, 1)])
def test_idb(impl: str, size: tuple[int, int]):
    x, r = draw(2, 16, *size), draw(2, 16, *size)
    (w1, w2, _), (b1, b2, _) = filters(16, 1)
    same(lambda *t: idb.idb(*t, 0.2, impl), lambda *t: idb.reference(*t, 0.2), [x, r, w1, b1, w2, b2])


@pytest.mark.parametrize("impl", FAST)
def test_idb_of_one_tensor_twice_has_both_gradients(impl: str):
    (w1, w2, _), (b1, b2, _) = filters(16, 1)
    same(lambda r, *p: idb.idb(r, r, *p, 0.2, impl), lambda r, *p: idb.reference(r, r, *p, 0.2),
         [draw(1, 16, 4, 5), w1, b1, w2, b2])  # fmt: skip


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("blocks", "size"), [(1, (7, 3)), (2, (9, 5)), (4, (4, 4))])
def test_ridb(impl: str, blocks: int, size: tuple[int, int]):
    weights, biases = filters(16, blocks)
    same(ridb_of(impl, blocks), ridb_of("reference", blocks), [draw(2, 16, *size), *weights, *biases])


@pytest.mark.parametrize("impl", FAST)
def test_ridb_without_gradient_keeps_nothing_and_is_the_same(impl: str):
    weights, biases = filters(16, 3)
    r = draw(1, 16, 5, 6)
    with torch.no_grad():
        found = ridb_of(impl, 3)(r, *weights, *biases)
        _, saved, masks = torch.ops.sega_dist.ridb(r, weights, biases, 0.2, 0.3, False, impl)
        assert error(found, ridb_of("reference", 3)(r, *weights, *biases)) <= TOLERANCE[WIDEST]
    assert saved.numel() == masks.numel() == 0


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("slope", [0.2, 1.0, 0.0])
def test_upconv_act(impl: str, slope: float):
    inputs = [draw(2, 16, 5, 3), draw(64, 16, 3, 3), draw(64)]
    same(lambda *t: upconv_act.upconv_act(*t, slope, impl), lambda *t: upconv_act.reference(*t, slope), inputs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (6, 6), (5, 8), (1500, 1300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rals_closed_form_is_autograd_of_the_reference(n: int, m: int, sign: float, dtype: torch.dtype):
    if dtype == torch.float64 and not compat.IS_INTERPRETING:
        pytest.skip("kernels in fp64 need the interpreter")
    real, fake = draw(n, 1, dtype=dtype), draw(m, 1, dtype=dtype)
    same(lambda a, b: 3 * rals.rals(a, b, a.mean(), b.mean(), sign, "triton"),
         lambda a, b: 3 * rals.reference(a, b, a.mean(), b.mean(), sign), [real, fake],
         1e-12 if dtype == torch.float64 else 1e-6)  # fmt: skip


def test_rals_on_two_ranks_is_that_of_the_whole_batch():
    """Each rank knows its logits and the global means; the mean over ranks of loss and gradient is the global one."""
    real, fake = draw(8, 1), draw(8, 1)
    whole = rals.reference(real, fake, real.mean(), fake.mean(), 1.0)
    expected = torch.autograd.grad(whole, [real, fake])
    means = real.mean().detach(), fake.mean().detach()
    parts = [rals.rals(real[i : i + 4], fake[i : i + 4], *means, 1.0, "triton") for i in (0, 4)]
    found = torch.autograd.grad(sum(parts) / 2, [real, fake])
    limit = 1e-12 if compat.IS_INTERPRETING else 1e-6
    assert error(sum(parts) / 2, whole) <= limit
    assert max(map(error, found, expected)) <= limit


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_err_no_more_than_torchs_own(impl: str, dtype: torch.dtype):
    """Maps in `dtype` with fp32 filters. Near a kink rounding changes a slope, so torch in that dtype is the measure.

    With the bias apart, as on a GPU: torch's convolutions on a CPU add it before they round, cuDNN's do not.
    """

    def bias_apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.conv2d(x, weight, padding=1) + bias.view(1, -1, 1, 1)
        return F.leaky_relu(F.pixel_shuffle(z, 2), 0.2)

    up = [draw(1, 16, 4, 3), draw(64, 16, 3, 3, scale=0.1), draw(64)]
    block = [draw(2, 16, 5, 6), *(t for part in filters(16, 1) for t in part)]
    for fast, reference, inputs in (
        (lambda *t: upconv_act.upconv_act(*t, 0.2, impl), bias_apart, up),
        (ridb_of(impl, 1), ridb_of("reference", 1), block),
    ):
        inputs = [t.detach().to(dtype).double() for t in inputs]
        g = torch.randn_like(reference(*inputs)).to(dtype).double()

        def run(op: Callable[..., Tensor], of_map: torch.dtype, of_parameter: torch.dtype) -> list[Tensor]:
            given = [t.to(of_parameter if i else of_map).requires_grad_() for i, t in enumerate(inputs)]  # noqa: B023
            y = op(*given)
            gradients = torch.autograd.grad(y, given, g.to(y.dtype))  # noqa: B023
            assert [t.dtype for t in (y, *gradients)] == [of_map, of_map, *[of_parameter] * (len(given) - 1)]
            return [y, *gradients]

        exact = run(reference, torch.float64, torch.float64)
        for mine, torchs, true in zip(
            run(fast, dtype, torch.float32), run(reference, dtype, dtype), exact, strict=True
        ):
            assert error(mine, true) <= 2 * error(torchs, true) + TOLERANCE[dtype] / 2


# Derivatives, registration, compilation ----------------------------------------------------------------------------


def away_from_the_kink(*shape: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return (x + 0.1 * x.sign()).requires_grad_()


@needs_fp64
def test_gradcheck_of_the_kernels():
    """Numerical derivatives of the fused paths themselves, not by way of the reference."""
    x, w, b = away_from_the_kink(1, 16, 2, 3), draw(16, 16, 3, 3, scale=0.05), away_from_the_kink(16)
    torch.autograd.gradcheck(lambda *t: conv3x3_act.conv3x3_act(*t, None, 0.2, 0.7, True, "triton")[..., :2],
                             (x, None, w, b), fast_mode=True)  # fmt: skip
    torch.autograd.gradcheck(lambda *t: bias_act.bias_act(t[0], t[1], [t[0]], 0.2, 0.5, "triton"), (x, b),
                             fast_mode=True)  # fmt: skip
    w4, b4 = draw(64, 16, 3, 3, scale=0.05), away_from_the_kink(64)
    torch.autograd.gradcheck(lambda *t: upconv_act.upconv_act(*t, 0.2, "triton"), (x, w4, b4), fast_mode=True)
    weights, biases = filters(16, 1)
    torch.autograd.gradcheck(ridb_of("triton", 1), (x, *weights, *biases), fast_mode=True)
    logits = draw(2, 4, 1)
    torch.autograd.gradcheck(lambda t: rals.rals(t[0], t[1], t[0].mean(), t[1].mean(), 1.0, "reference"), logits)


LATER = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("sliced", "channels_last")]


@needs_fp64
@pytest.mark.parametrize("layout", ["contiguous", *LATER])
def test_opcheck(layout: str):
    """Schema, fake tensors, autograd registration and ahead-of-time autograd, for each layout of the inputs."""

    def arrange(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.detach().to(memory_format=torch.channels_last).requires_grad_()
        if layout == "sliced":
            return torch.cat([x, x], 1).detach()[:, : x.shape[1]].requires_grad_()
        return x

    check = torch.library.opcheck
    x, r = arrange(draw(1, 16, 2, 3)), arrange(draw(1, 16, 2, 3))
    weights, biases = filters(16, 1)
    ops = torch.ops.sega_dist
    check(ops.bias_act, (x, biases[0], [r], 0.2, 1.0))
    check(ops.conv3x3_act, (x, r, weights[1], biases[1], x, 0.2, 1.0, True))
    check(ops.upconv_act, (x, draw(64, 16, 3, 3), draw(64), 0.2, "triton"))
    for impl in FAST if layout == "channels_last" else ["triton"]:
        check(ops.ridb, (x, weights, biases, 0.2, 0.3, True, impl))
    logits = draw(4, 1)
    check(ops.rals, (logits, logits, logits.detach().mean(), logits.detach().mean(), 1.0))


def test_second_derivative_is_refused():
    weights, biases = filters(16, 1)
    x = draw(1, 16, 2, 2)
    for y in (
        bias_act.bias_act(x, biases[0], [], 0.2, 1.0, "triton"),
        conv3x3_act.conv3x3_act(x, None, weights[0], biases[0], None, 0.2, impl="triton"),
        ridb_of("hybrid", 1)(x, *weights, *biases),
        upconv_act.upconv_act(x, draw(64, 16, 3, 3), draw(64), 0.2, "hybrid"),
        rals.rals(x.flatten()[:, None], x.flatten()[:, None], x.mean(), x.mean(), 1.0, "triton"),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="kernels=reference"):
            gradient.sum().backward()


def test_a_choice_is_marked_as_torch_marks_what_is_constant():
    assert vars(backend._choose) == vars(torch.compiler.assume_constant_result(lambda: None))


@pytest.mark.parametrize("impl", [*FAST, "auto"])
def test_compiles_as_one_graph(impl: str):
    weights, biases = filters(16, 1)
    up, of_up = draw(64, 16, 3, 3), draw(64)

    def both(r: Tensor) -> Tensor:
        x = ridb_of(impl, 1)(r, *weights, *biases)
        return upconv_act.upconv_act(x, up, of_up, 0.2, impl)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for size in ((2, 3), (3, 3)):  # the second shape makes the compiler think of dynamic ones
        r = draw(1, 16, *size)
        y, expected = compiled(r), both(r)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        for found, wanted in zip(*(torch.autograd.grad(o, [r, *weights], g) for o in (y, expected)), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(impl: str, dtype: torch.dtype):
    """Under autocast maps are narrow, parameters and their gradients stay fp32."""
    weights, biases = filters(16, 1, torch.float32)
    r = draw(1, 16, 4, 5, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype):
        y = ridb_of(impl, 1)(r, *weights, *biases)
        inner = idb.idb(r, r, weights[0], biases[0], weights[1], biases[1], 0.2, impl)
        up, of_up = draw(64, 16, 3, 3, dtype=torch.float32), draw(64, dtype=torch.float32)
        z = upconv_act.upconv_act(r, up, of_up, 0.2, impl)
    assert y.dtype == z.dtype == inner.dtype == dtype
    assert error(y, ridb_of("reference", 1)(r, *weights, *biases)) <= TOLERANCE[dtype]
    gradients = torch.autograd.grad(y.float().sum(), [r, *weights, *biases])
    assert {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_layout_gives_the_same_and_channels_last_comes_out(layout: torch.memory_format):
    weights, biases = filters(16, 1)
    r = draw(2, 16, 3, 5)
    expected = ridb_of("triton", 1)(r, *weights, *biases)
    arranged = [t.detach().to(memory_format=layout) if t.dim() == 4 else t for t in (r, *weights, *biases)]
    found = ridb_of("triton", 1)(*arranged)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Memory ------------------------------------------------------------------------------------------------------------


def guarded(*shape: int, fill: float = float("nan")) -> tuple[Tensor, Tensor]:
    """A dense tensor in the middle of a larger buffer full of `fill`, and that buffer."""
    count, margin = math.prod(shape), 4096
    buffer = torch.full((count + 2 * margin,), fill, dtype=WIDEST, device=DEVICE)
    inner = buffer[margin : margin + count].view(shape)
    inner.copy_(torch.randn(shape))
    return inner, buffer


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (9, 5)])
def test_nothing_is_read_or_written_out_of_bounds(size: tuple[int, int]):
    """Inputs lie among NaN, outputs among sevens: results stay finite, the sevens stay sevens."""
    n, c = 2, 16
    x, f = guarded(n, *size, c)[0], guarded(n, *size, c)[0]
    w, bias = guarded(c, 3, 3, 2 * c)[0], guarded(c)[0]
    (y, around_y), (dz, around_dz) = guarded(n, *size, c, fill=7.0), guarded(n, *size, c, fill=7.0)
    mask = torch.full((2 + n * math.prod(size),), 77, dtype=torch.int16, device=DEVICE)
    inner = mask[1:-1].view(n, *size, 1)
    conv3x3_act.run_forward(x, f, w, bias, x, y, inner, 0.2, 1.0, add_sources=True)
    sources = [(f, w[..., :c]), (x, w[..., c:])]
    conv3x3_act.run_input_grad(sources, [x, f], torch.stack([x, f]), dz=dz, mask=inner, slope=0.2)
    assert y.isfinite().all() and dz.isfinite().all()
    assert mask[0] == mask[-1] == 77
    for around, used in ((around_y, y), (around_dz, dz)):
        assert (around == 7).sum() >= around.numel() - used.numel()
        assert (around[:4096] == 7).all() and (around[-4096:] == 7).all()
    assert conv3x3_act.run_weight_grad([x, f], y).isfinite().all()
    up, around_up = guarded(n, 2 * size[0], 2 * size[1], c, fill=7.0)
    w4, b4 = guarded(4 * c, 3, 3, c)[0], guarded(4 * c)[0]
    conv3x3_act.run_forward(x, None, w4, b4, None, up, None, 0.2, 1.0, shuffle=True)
    assert up.isfinite().all() and (around_up[:4096] == 7).all() and (around_up[-4096:] == 7).all()


def test_an_epilogue_may_write_a_slice_of_a_wider_buffer():
    z, bias = draw(2, 3, 5, 16).detach(), draw(16).detach()
    wide = torch.full((2, 3, 5, 32), 7.0, dtype=WIDEST, device=DEVICE)
    dense = torch.empty_like(z)
    bias_act.run_bias_act(z, bias, [], dense, None, 0.2, 1.0, y2=wide[..., 16:])
    assert (wide[..., :16] == 7).all()
    torch.testing.assert_close(wide[..., 16:], F.leaky_relu(z + bias, 0.2))
    torch.testing.assert_close(dense, wide[..., 16:])


def test_saved_activations_of_the_trunk_are_under_45_percent():
    """Bytes that autograd keeps between forward and backward of one RIDB in bf16, parameters apart."""

    def kept(impl: str) -> int:
        weights, biases = filters(16, 4, torch.float32)
        r = draw(2, 16, 8, 8, dtype=torch.bfloat16)
        parameters = {t.untyped_storage().data_ptr() for t in (*weights, *biases)}
        found: dict[int, tuple[int, Tensor]] = {}

        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters and t.dim() >= 4 and t.shape[-1] != 3:
                found[storage.data_ptr()] = storage.nbytes(), t
            return t

        with torch.autocast(DEVICE, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            ridb_of(impl, 4)(r, *weights, *biases)
        return sum(size for size, _ in found.values())

    assert kept("triton") <= 0.45 * kept("reference")


# Properties --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.sampled_from([16, 32, 64]),
    st.sampled_from([0, 16, 32]), st.sampled_from([0.0, 0.01, 0.2, 1.0]), st.booleans(), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_conv3x3_act_of_any_shape(n: int, h: int, w: int, c0: int, c1: int, slope: float, has_bias: bool,
                                  has_res: bool, is_sliced: bool, add: bool):  # fmt: skip
    x0 = draw(n, 2 * c0, h, w)[:, :c0] if is_sliced else draw(n, c0, h, w)
    x1 = draw(n, c1, h, w) if c1 else None
    co = c0
    weight, bias = draw(co, c0 + c1, 3, 3, scale=0.1), draw(co) if has_bias else None
    res = x0 if has_res else None  # aliasing on purpose
    add = add and c1 in (0, c0)
    flags = (slope, 0.7, add)
    with torch.no_grad():
        found = conv3x3_act.conv3x3_act(x0, x1, weight, bias, res, *flags, impl="triton")
        assert error(found, conv3x3_act.reference(x0, x1, weight, bias, res, *flags)) <= TOLERANCE[WIDEST]


def test_linearity_translation_and_zero_weights():
    w, zero = draw(16, 16, 3, 3), torch.zeros(16, 16, 3, 3, dtype=WIDEST, device=DEVICE)

    def conv(x: Tensor, weight: Tensor = w) -> Tensor:
        return conv3x3_act.conv3x3_act(x, None, weight, None, impl="triton")

    x, y = draw(1, 16, 6, 7), draw(1, 16, 6, 7)
    assert error(conv(x + 2 * y), conv(x) + 2 * conv(y)) <= TOLERANCE[WIDEST]
    moved = conv(x.roll(1, 3))[..., 2:-1]
    assert error(moved, conv(x)[..., 1:-2]) <= TOLERANCE[WIDEST]
    assert not conv(x, zero).any()
    weights, biases = filters(16, 2)
    assert torch.equal(ridb_of("triton", 2)(x, *[0 * t for t in weights], *[0 * t for t in biases]), x)


# Modules -----------------------------------------------------------------------------------------------------------


def small(impl: str, channels: int = 16) -> nn.Module:
    """A generator with one RIDB, of the same weights whatever computes it."""
    torch.manual_seed(3)
    config = Config(
        data=DataConfig(size=32), generator=GeneratorConfig(channels=channels, nested_blocks=1), kernels=impl
    )
    generator = build_generator(config)
    generator.trunk = ResidualInternalDenseBlock(channels, 0.2, 0.2, impl)
    return generator.to(DEVICE, WIDEST)


def test_state_dicts_are_identical():
    reference = small("reference").state_dict()
    for impl in FAST:
        mine = small(impl).state_dict()
        assert list(mine) == list(reference)
        assert all(torch.equal(mine[name], reference[name]) for name in mine)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.slow), "hybrid"])
def test_five_training_steps_are_those_of_the_reference(impl: str):
    """Adam on a generator with one RIDB: losses and weights with and without kernels."""

    def train(which: str) -> tuple[list[float], list[Tensor]]:
        generator = small(which)
        optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
        lr, hr = draw(2, 3, 4, 4).detach(), draw(2, 3, 16, 16).detach().tanh()
        losses = []
        for _ in range(5):
            loss = (generator(lr) - hr).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [p.detach() for p in generator.parameters()]

    torch.manual_seed(5)
    expected, weights = train("reference")
    torch.manual_seed(5)
    found, mine = train(impl)
    limit = 1e-9 if compat.IS_INTERPRETING else 1e-4
    assert found == pytest.approx(expected, rel=limit)
    assert found[-1] < found[0]
    assert max(map(error, mine, weights)) <= limit


# Choice and bad input ----------------------------------------------------------------------------------------------


def test_auto_without_a_measurement_is_the_reference():
    x = draw(1, 16, 2, 2)
    assert backend.choose("auto", "ridb", x, 0.2) == "reference"
    assert backend.choose("triton", "ridb", x, 0.2) == "triton"
    assert backend.choose("triton", "ridb", x[:0], 0.2) == "reference"


def test_auto_says_once_what_it_takes(caplog: pytest.LogCaptureFixture):
    backend._log_once.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(3):
            backend.choose("auto", "ridb", draw(1, 16, 2, 2), 0.2)
    assert len(caplog.messages) == 1 and "ridb on 1x16x2x2" in caplog.messages[0] and "reference" in caplog.messages[0]


def test_auto_takes_what_the_table_of_this_gpu_measured(monkeypatch: pytest.MonkeyPatch):
    dtype = backend.DTYPES[WIDEST]
    rows = [{"op": "ridb", "channels": 16, "dtype": dtype, "pixels": pixels, "impl": impl}
            for pixels, impl in ((16, "hybrid"), (4096, "triton"))]  # fmt: skip
    monkeypatch.setattr(backend, "_table", lambda name, part="launch": rows)
    wide, narrow = (torch.empty(1, 16, *size, dtype=WIDEST, device=DEVICE) for size in ((64, 64), (2, 8)))
    assert backend.choose("auto", "ridb", wide) == "triton"
    assert backend.choose("auto", "ridb", narrow) == "hybrid"
    assert backend.choose("auto", "ridb", wide.half()) == "reference"
    assert backend.choose("auto", "upconv_act", wide) == "reference"


def test_bad_input_is_one_clear_error():
    weights, biases = filters(16, 1)
    x = draw(1, 16, 2, 2)
    conv = conv3x3_act.conv3x3_act
    for call, words in [
        (lambda: conv(draw(1, 24, 2, 2), None, draw(24, 24, 3, 3), None, impl="triton"), "24 channels.*multiple of 16"),
        (lambda: conv(x, None, draw(24, 16, 3, 3), None, impl="triton"), "24 channels.*multiple of 16"),
        (lambda: conv(x, None, draw(16, 32, 3, 3), None, impl="triton"), "32, 3, 3.*16 channels"),
        (lambda: conv(x, x, draw(32, 32, 3, 3), None, add_sources=True, impl="triton"), r"\[16, 16\].*32"),
        (lambda: conv(x, x.to(torch.bfloat16), weights[1], None, impl="triton"), "bfloat16"),
        (lambda: conv(x, None, weights[0].to("meta"), None, impl="triton"), "meta"),
        (lambda: conv(x, None, weights[0], None, slope=-0.1, impl="triton"), "slope -0.1.*0"),
        (lambda: ridb.ridb(x, weights[:2], biases[:2], 0.2, 0.2, "triton"), "needs filters"),
        (lambda: upconv_act.upconv_act(x, draw(32, 16, 3, 3), draw(32), 0.2, "triton"), r"\(64, 16, 3, 3\).*\(32, 16"),
        (lambda: bias_act.bias_act(x, None, [x] * 4, 0.2, 1.0, "triton"), "at most 3 addends, not 4"),
        (lambda: backend.plan("triton", {"ridb": [4096, 64, 128, 128]}, torch.float32, DEVICE, 0.2),
         "8,589,934,592 elements.*2,147,483,648"),
        (lambda: backend.choose("triton", "conv3x3_act", x.detach().expand(2**23, -1, -1, -1), 0.2, 64),
         "2,147,483,648 elements.*2,147,483,648"),
        (lambda: backend.plan("triton", {"ridb": [1, 64, 8, 8]}, torch.int32, DEVICE, 0.2), "int32"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_auto_computes_what_kernels_cannot():
    x, w = draw(1, 24, 3, 3), draw(24, 24, 3, 3)
    y = conv3x3_act.conv3x3_act(x, None, w, None, slope=-0.5)
    torch.testing.assert_close(y, F.leaky_relu(F.conv2d(x, w, padding=1), -0.5))
    empty = ridb_of("triton", 1)(draw(0, 16, 3, 3), *[t for part in filters(16, 1) for t in part])
    assert empty.shape == (0, 16, 3, 3)


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from sega_dist.config import Config, GeneratorConfig
from sega_dist.networks.build import build_generator
generator = build_generator(Config(generator=GeneratorConfig(channels=16, nested_blocks=1)))
generator(torch.rand(1, 3, 8, 8)).sum().backward()
try:
    build_generator(Config(kernels="triton"))(torch.rand(1, 3, 8, 8))
except ValueError as error:
    print(error)
"""


def test_works_without_triton_and_says_so_when_it_is_asked_for():
    assert "triton is not installed" in python(WITHOUT)


def test_kernels_on_a_cpu_are_refused_outside_the_interpreter():
    code = WITHOUT.replace('sys.modules["triton"] = None', "")
    assert "kernels need a GPU" in python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")


# The suite itself --------------------------------------------------------------------------------------------------

FAULTS = {
    "a tap off by one": ("conv3x3_act.py", "tap // 3 - 1, tap % 3 - 1", "tap // 3 - 1, tap % 3"),
    "a dropped border mask": ("conv3x3_act.py", "C + k[None, :], mask=inside[:, None]", "C + k[None, :], mask=None"),
    "signs shifted by one": ("bias_act.py", "[:, :, None] >> tl.arange(0, 16)", "[:, :, None] >> 1 + tl.arange(0, 16)"),
    "a residual gradient left out": ("ridb.py", "[gs[0], g], planes=gs, gx=gr", "[gs[0]], planes=gs, gx=gr"),
    "a box of pixels left out": ("conv3x3_act.py", "range(split, BOXES, SPLITS)", "range(split, BOXES - 1, SPLITS)"),
    "a mean without gradient": ("rals.py", "2.0 * (off + through) / N", "2.0 * off / N"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_turns_the_suite_red(fault: str, tmp_path: Path):
    file, right, wrong = FAULTS[fault]
    for folder in ("sega_dist", "kernels", "data", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run() -> subprocess.CompletedProcess[str]:
        words = ["-m", "pytest", "-q", "-x", "tests/test_kernels.py", "-p", "no:cacheprovider", "-k",
                 "test_idb or test_ridb or out_of_bounds or rals_closed"]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    path = tmp_path / "kernels" / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    red = run()
    assert red.returncode == 1 and " failed" in red.stdout, red.stdout[-2000:] + red.stderr[-2000:]


AHEAD = ["-m", "sega_dist.kernels.aot", "--table", "start"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_90 bf16", "sm_80 bf16", "sm_89 fp16", "sm_100 bf16", "gfx942 fp32"])
def test_kernels_compile_for_chips_that_are_not_here(chip: str, tmp_path: Path):
    """Fit in shared memory, spill nothing, use the matrix units, serialise no wgmma; the command fails otherwise."""
    architecture, dtype = chip.split()
    rows = ahead("--arch", architecture, "--dtype", dtype, "--json", tmp_path / "rows.json")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert rows.returncode == 0, rows.stdout
    names = {row["kernel"] for row in found}
    assert names == {"conv3x3_forward", "conv3x3_input_grad", "conv3x3_weight_grad", "ridb_weight_grad",
                     "bias_act_epilogue", "act_grad", "rals_both"}  # fmt: skip
    products = [row for row in found if row["kernel"].startswith(("conv3x3", "ridb"))]
    assert all(row["matrix"] for row in products)


def ahead(*words: object) -> subprocess.CompletedProcess[str]:
    """The ahead-of-time check; never in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, *AHEAD, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_ahead_of_time_check_sees_what_does_not_fit():
    """Twice the pixels with as many warps do not fit in registers: a row says so and the command fails."""
    code = (
        "import sys, torch\n"
        "from sega_dist.kernels import aot, backend\n"
        "entry = dict(TH=8, TW=32, BN=64, BK=64, SWAP=False, TMA=False, num_warps=4, num_stages=6)\n"
        "entries = {k: p for t in aot.tables('bf16', 'sm_80', ['start']) for k, p in t.items()}\n"
        "with backend.forced(**entries | {'conv3x3': entry}):\n"
        "    rows = [aot.check(launch, 'sm_80') for launch in aot.launches(torch.bfloat16)[:2]]\n"
        "print([fault for row in rows for fault in row['faults']])\n"
    )
    said = python(code, TRITON_INTERPRET="0")
    assert "spilled" in said and "bytes of shared memory, the chip has 166,912" in said
