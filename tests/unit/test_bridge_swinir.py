"""SwinIR projector: window attention against a loop, padding, sizes, upscaling, parameter count."""

from __future__ import annotations

import itertools

import pytest
import torch

from raydistill.bridge.swinir import SwinIR, WindowAttention, attend, padded_attention, shifts_of, window_mask


def naive_attention(module: WindowAttention, x_BHWC: torch.Tensor, shift: int) -> torch.Tensor:
    """Every token in a loop: it attends to the tokens of its shifted window, without wrapping around the map."""
    batch, height, width, dim = x_BHWC.shape
    window, heads = module.window, module.heads
    q, k, v = module.qkv(x_BHWC).unflatten(-1, (3, heads, dim // heads)).unbind(3)
    out = torch.zeros_like(x_BHWC)
    tokens = list(itertools.product(range(height), range(width)))

    def cell(position: int, size: int) -> int:  # windows start at shift, shift ± window, …; the first may be partial
        offset = shift if size > window else 0
        return (position - offset) // window

    for b, (r, c), head in itertools.product(range(batch), tokens, range(heads)):
        seen = [(i, j) for i, j in tokens if cell(i, height) == cell(r, height) and cell(j, width) == cell(c, width)]
        logits = torch.stack(
            [
                q[b, r, c, head] @ k[b, i, j, head] / (dim // heads) ** 0.5
                + module.bias_table[(r - i + window - 1) * (2 * window - 1) + (c - j + window - 1), head]
                for i, j in seen
            ]
        )
        attended = sum(p * v[b, i, j, head] for p, (i, j) in zip(logits.softmax(0), seen, strict=True))
        out[b, r, c, head * (dim // heads) : (head + 1) * (dim // heads)] = attended
    return module.proj(out)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (6, 5), (3, 9), (2, 7)])
def test_window_attention_equals_a_loop_over_tokens(height, width, shifted):
    generator = torch.Generator().manual_seed(0)
    module = WindowAttention(dim=8, heads=2, window=4).double()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.7, generator=generator)
    x = torch.randn(2, height, width, 8, generator=generator, dtype=torch.float64)
    shifts = shifts_of(height, width, 4) if shifted else (0, 0)
    with torch.no_grad():
        computed = module(x, shifts, window_mask(height, width, 4, shifts, x.device))
        expected = naive_attention(module, x, 2 if shifted else 0)
    assert torch.allclose(computed, expected, atol=1e-12)


@pytest.mark.parametrize("width", [6, 8, 20])
def test_heads_filled_up_for_a_gpu_attend_as_they_are(width):
    """Values and gradients, also those of the bias; some of it is a mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 16, width, generator=generator, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 6, 16, 16, generator=generator)
    bias[:, :2, :8, 8:] = bias[:, :2, 8:, :8] = float("-inf")
    bias.requires_grad_(True)
    found = []
    for function in (attend, padded_attention):
        attended = function(q, k, v, bias)
        assert attended.shape == q.shape
        found.append([attended, *torch.autograd.grad(attended.sin().sum(), (q, k, v, bias))])
    for computed, expected in zip(*found, strict=True):
        torch.testing.assert_close(computed, expected, rtol=0, atol=1e-6)


def test_size_of_the_paper():
    with torch.device("meta"):
        model = SwinIR(512, 16, embed_dim=120, depths=[6] * 5, heads=6, window=8, mlp_ratio=2.0)
    count = sum(p.numel() for p in model.parameters())
    assert 4.87e6 <= count <= 4.90e6  # arXiv 2606.32020


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 9), (2, 2)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_any_size_and_power_of_two_upscaling(height, width, scale):
    model = SwinIR(3, 5, embed_dim=8, depths=[2], heads=2, window=4, scale=scale)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 5, height * scale, width * scale)


def test_gradient_checkpointing_changes_no_number():
    torch.manual_seed(0)
    model, x = SwinIR(3, 5, embed_dim=8, depths=[2, 2], heads=2, window=4), torch.randn(2, 3, 10, 8)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.any() for g in gradients[0])


def test_shifted_layers_carry_information_beyond_a_window():
    """Four convolutions alone reach four pixels, and unshifted windows would add none but their own."""
    torch.manual_seed(0)
    model = SwinIR(1, 1, embed_dim=8, depths=[4], heads=2, window=4)
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    model(x)[0, 0, 0, 0].backward()
    assert x.grad[0, 0, 0, 9] != 0


@pytest.mark.parametrize(
    ("arguments", "said"), [({"embed_dim": 10, "heads": 4}, "multiple of heads"), ({"scale": 0}, "above 0")]
)
def test_impossible_sizes_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SwinIR(3, 3, **({"embed_dim": 8, "heads": 2} | arguments))
