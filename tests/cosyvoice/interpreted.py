"""Runs the Triton kernels in Triton's own interpreter, on CPU tensors, and prints how far they lie from the modules.

A script of its own, because TRITON_INTERPRET must be set before the kernels are imported: `flow` or `vocoder`.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor, nn

from cosyvoice.cfm import ConditionalCFM
from cosyvoice.config import EstimatorConfig, FlowConfig, HiFTConfig
from cosyvoice.fused import FusedSolver
from cosyvoice.fused_vocoder import FusedVocoder
from cosyvoice.hift import HiFTVocoder, Snake, SourceDraws

torch.set_num_threads(1)


def repair_interpreter() -> None:
    """Loop bounds that come from tensors; bfloat16, which it multiplies as integers and rounds towards zero."""
    cast = interpreter.InterpreterBuilder.cast_impl
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def floats(handle: interpreter.TensorHandle) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def dot(self: object, a: object, b: object, acc: object, *options: object) -> object:
        return interpreter.TensorHandle(floats(a) @ floats(b) + acc.data, acc.dtype.scalar)

    def rounded(self: object, source: object, target: object) -> object:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            values = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(values, tl.bfloat16)
        return cast(self, source, target)

    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.cast_impl = rounded
    interpreter.InterpreterBuilder.create_dot = dot


def lively(model: nn.Module) -> nn.Module:
    """Vectors that are not all zeros or ones."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


def differences(got: Tensor, wanted: Tensor) -> dict[str, float]:
    apart = (got.float() - wanted.float()).abs()
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def flow() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    sizes = EstimatorConfig(channels=(32, 32), attention_head_dim=16, n_blocks=1, num_mid_blocks=1, num_heads=2)
    cfm = lively(ConditionalCFM(FlowConfig(estimator=sizes)))
    room, lengths = 48, [37, 9]
    inputs = [torch.randn(2, 80, room) for _ in range(3)]
    voice = torch.randn(2, 80)
    rows: dict[str, dict[str, float]] = {}
    exact = _plain(cfm, inputs, voice, lengths)
    for dtype in (torch.float32, torch.bfloat16):
        cfm = cfm.to(dtype)
        noise, mu, cond = (value.to(dtype) for value in inputs)
        got = FusedSolver(cfm)(noise, torch.tensor(lengths), mu, voice.to(dtype), cond, 1)
        got = torch.cat([row[:, :length] for row, length in zip(got, lengths)], dim=1)
        rows[str(dtype)] = differences(got, exact)
    rows["plain bfloat16"] = differences(_plain(cfm, inputs, voice, lengths, torch.bfloat16), exact)
    return rows


def _plain(
    cfm: ConditionalCFM, inputs: list[Tensor], voice: Tensor, lengths: list[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Each row alone, at its own length."""
    done = []
    for row, length in enumerate(lengths):
        noise, mu, cond = (value[row : row + 1, :, :length].to(dtype) for value in inputs)
        done.append(cfm(noise, None, mu, voice[row : row + 1].to(dtype), cond, 1)[0])
    return torch.cat(done, dim=1)


def vocoder() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    shapes = {"resblock_kernel_sizes": (3, 7), "resblock_dilation_sizes": ((1, 3), (1, 3))}
    config = HiFTConfig(
        base_channels=64, f0_cond_channels=16, source_resblock_dilation_sizes=((1, 3), (1, 3)), **shapes
    )
    model = HiFTVocoder(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Snake):
            module.alpha.copy_(torch.rand_like(module.alpha) * 3 + 0.2)
    for name, parameter in model.named_parameters():
        if "resblocks" in name and parameter.ndim == 3:
            parameter.mul_(5.0)  # the residual branches matter
    model.conv_post.weight.mul_(20.0)
    mel, lengths = torch.randn(2, 80, 3), torch.tensor([3, 2])
    draws = SourceDraws.batch([SourceDraws.draw(config, 3, torch.Generator().manual_seed(seed)) for seed in range(2)])
    wanted = model(mel, draws, lengths).wav
    rows = {"scale": {"largest": float(wanted.abs().max()), "mean": float(wanted.abs().mean())}}
    for precision in ("float32", "float16"):
        rows[precision] = differences(FusedVocoder(model, precision)(mel, draws, lengths).wav, wanted)
    return rows


if __name__ == "__main__":
    repair_interpreter()
    print(json.dumps({"flow": flow, "vocoder": vocoder}[sys.argv[1]]()))
