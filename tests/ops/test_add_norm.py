# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from tools import (
    CPU_TIERS,
    DTYPES,
    assert_compiles_fullgraph,
    assert_matches_reference,
    assert_repeatable,
    cpu_tier,
    leaf,
    run,
)
from torch import Tensor

from hourllava_ext import add_norm, reference

# M, C: one row, odd widths, the small model's, whole chunks of rows and more of them than 512, nothing.
SHAPES = [(1, 16), (7, 33), (63, 96), (3, 2049), (16, 8), (4201, 5), (0, 8), (3, 0)]


def make(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    return [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype), *(leaf(shape[1], dtype=dtype) for _ in range(2))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches_reference(add_norm, reference.add_norm, *make(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tier", CPU_TIERS)
def test_every_instruction_set(tier: str, dtype: torch.dtype) -> None:
    with cpu_tier(tier):
        assert_matches_reference(add_norm, reference.add_norm, *make((37, 131), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_torch_s_layer_norm(dtype: torch.dtype) -> None:
    """As the model was trained: the sum is rounded before it is normalised, and nothing else is."""
    x, residual, weight, bias = (a.detach() for a in make((64, 96), dtype))
    x *= 100  # so that the rounding of the sum is what the result sees most of
    ours = add_norm(x, residual, weight, bias).double()
    torchs = F.layer_norm(x + residual, (96,), weight, bias).double()
    unrounded = F.layer_norm(x.double() + residual.double(), (96,), weight.double(), bias.double())
    apart, eps = (ours - torchs).abs(), torch.finfo(dtype).eps
    if dtype in (torch.float32, torch.float64):
        assert apart.max() < 8 * eps * torchs.abs().max()
    else:
        assert (apart <= eps * torchs.abs().clamp(min=2**-10)).all()
        assert (ours - torchs).abs().max() < (ours - unrounded).abs().max() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_zero(dtype: torch.dtype) -> None:
    """A row whose mean is large beside its spread, and one that is constant: only eps divides it."""
    x, residual, weight, bias = make((2, 257), dtype)
    with torch.no_grad():
        x[0] += 1000
        x[1], residual[1] = 3, -1
    assert_matches_reference(add_norm, reference.add_norm, x, residual, weight, bias)
    assert torch.equal(add_norm(x, residual, weight, bias)[1], bias)


def test_one_column_is_its_own_mean() -> None:
    args = make((5, 1), torch.float64)
    (out,), (*rows, weight, bias) = run(add_norm, args)
    assert torch.equal(out, args[3].expand(5, 1))
    assert not any(g.any() for g in (*rows, weight))
    assert bias.any()


def test_eps() -> None:
    args = make((5, 7), torch.float32)
    assert_matches_reference(add_norm, reference.add_norm, *args, 0.5)
    assert not torch.equal(add_norm(*args), add_norm(*args, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (a.detach() for a in make((6, 10), dtype))
    apart = x.T.contiguous().T, torch.stack([residual, residual], 1)[:, 0], weight.repeat_interleave(2)[::2]
    torch.testing.assert_close(add_norm(*apart, bias), add_norm(x, residual, weight, bias), rtol=0, atol=0)


def test_nothing_is_changed_in_place() -> None:
    """Both summands get a gradient of their own, and adding to one leaves the other."""
    x, residual, *parameters = make((5, 7), torch.float32)
    add_norm(x, residual, *parameters).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.add_(1)
    assert torch.equal(residual.grad, before)


def test_rows_do_not_see_each_other() -> None:
    args = [a.detach() for a in make((4, 33), torch.float32)]
    args[0][2] = torch.nan
    out = add_norm(*args)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("device_type", ["cpu"])
def test_autocast_computes_in_float32(device_type: str) -> None:
    x, residual, weight, bias = make((5, 7), torch.float32)
    half = residual.bfloat16()
    with torch.autocast(device_type, torch.bfloat16):
        out = add_norm(x, half, weight, bias)
        assert F.layer_norm(x + half, (7,), weight, bias).dtype == out.dtype == torch.float32
    assert torch.equal(out, add_norm(x, half.float(), weight, bias))
    out.sum().backward()
    assert residual.grad.dtype == torch.float32


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(add_norm, make((5, 6), torch.float64))


def test_opcheck() -> None:
    ops = torch.ops.hourllava_ext
    args = make((9, 6), torch.float32)
    torch.library.opcheck(ops.add_norm.default, tuple(args))
    *rows, _ = (a.detach() for a in args)
    torch.library.opcheck(ops.add_norm_backward.default, (rows[0], *rows, torch.randn(9), torch.rand(9)))


def test_compile_fullgraph() -> None:
    assert_compiles_fullgraph(add_norm, *make((7, 10), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(add_norm, *make((4500, 40), dtype))


def test_only_what_wants_a_gradient_gets_one() -> None:
    x, residual, weight, bias = (a.detach() for a in make((5, 7), torch.float32))
    _, (gradient,) = run(add_norm, [x, residual.requires_grad_(), weight, bias])
    _, (expected,) = run(reference.add_norm, [x, residual, weight, bias])
    torch.testing.assert_close(gradient, expected)


def test_bad_arguments() -> None:
    x, residual, weight, bias = make((7, 10), torch.float32)
    with pytest.raises(RuntimeError, match=r"x must be \(M, C\), got shape \(7, 1, 10\)"):
        add_norm(x[:, None], residual, weight, bias)
    with pytest.raises(RuntimeError, match=r"residual must have shape \(7, 10\), got \(6, 10\)"):
        add_norm(x, residual[1:], weight, bias)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(10\), got \(9\)"):
        add_norm(x, residual, weight[1:], bias)
    with pytest.raises(RuntimeError, match=r"bias must have shape \(10\), got \(10, 1\)"):
        add_norm(x, residual, weight, bias[:, None])
    for number, name in ((1, "residual"), (2, "weight"), (3, "bias")):
        args = [a.half() if i == number else a for i, a in enumerate((x, residual, weight, bias))]
        with pytest.raises(RuntimeError, match=f"{name} must have the dtype of x"):
            add_norm(*args)
    with pytest.raises(RuntimeError, match="x must be float32, float16, bfloat16 or float64"):
        add_norm(*(a.int() for a in (x, residual, weight, bias)))


def test_bad_backward_arguments() -> None:
    def call(**changed: Tensor) -> None:
        rows = {name: torch.randn(4, 3) for name in ("grad", "x", "residual")}
        given = rows | {"weight": torch.randn(3), "mean": torch.randn(4), "rstd": torch.rand(4)} | changed
        torch.ops.hourllava_ext.add_norm_backward(**given)

    call()
    with pytest.raises(RuntimeError, match=r"grad must be \(M, C\)"):
        call(grad=torch.randn(4))
    for name, wrong in (("x", (3, 3)), ("residual", (4, 2)), ("weight", (4,)), ("mean", (3,)), ("rstd", (4, 1))):
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            call(**{name: torch.randn(wrong)})
    for name, shape in (("x", (4, 3)), ("residual", (4, 3)), ("weight", (3,))):
        with pytest.raises(RuntimeError, match=f"{name} must have the dtype of grad"):
            call(**{name: torch.randn(shape).double()})
    for name in ("mean", "rstd"):
        with pytest.raises(RuntimeError, match=f"{name} must be float32, float64 for float64"):
            call(**{name: torch.randn(4).half()})
