"""Packages of AOTInductor, run by a process that has the kernel's library and no sources."""

import shutil
from pathlib import Path

import pytest
import torch
from frameworks.small_model import Encode, inputs_of, make_batch
from problems import run_python

import vicinal

KERNELS = sorted((Path(vicinal.__file__).parent / "backends" / "cpu").glob("_cpu*.so"))
OPS = ("neighborhood_attention", "neighborhood_attention_backward", "rotate", "rotate_backward")

LOADED_ALONE = """
import sys, torch
torch.ops.load_library({kernel!r})
print([str(getattr(torch.ops.vicinal, name).default._schema) for name in {ops}])
assert "vicinal" not in sys.modules
"""

RUN = """
import sys, torch
import torch._inductor.codecache  # torch 2.10 needs it and does not import it
torch.ops.load_library({kernel!r})
encode = torch._inductor.aoti_load_package({package!r})
for inputs, expected in torch.load({cases!r}):
    torch.testing.assert_close(encode(*inputs), expected)
assert "vicinal" not in sys.modules
print("done")
"""


@pytest.mark.skipif(not KERNELS, reason="the kernel is not built")
def test_the_kernel_defines_the_ops_as_python_does() -> None:
    printed = run_python(LOADED_ALONE.format(kernel=str(KERNELS[0]), ops=OPS))
    # The ops of the other back end, which Python defines.
    schemas = [str(getattr(torch.ops.vicinal_triton, name).default._schema) for name in OPS]
    assert eval(printed) == [schema.replace("vicinal_triton", "vicinal") for schema in schemas]


@pytest.mark.skipif(not KERNELS, reason="the kernel is not built")
def test_no_background_may_be_none() -> None:
    """As packages pass it for an empty list."""
    q = torch.randn(3, 2, 4)
    plan = vicinal.plan_neighborhoods(
        torch.rand(3, 2) * 8, torch.tensor([0, 3]),
        vicinal.FeaturePyramid(torch.randn(3, 8), torch.tensor([[0, 2, 2, 0]] * 3), ((8, 8),), 1),
        [5],
    )  # fmt: skip
    tensors = plan._tensors
    parts = [*tensors.query_slices, tensors.query_batch, tensors.first_columns]
    parts += [tensors.point_columns, tensors.window_rows]
    settings = parts, tensors.slices_per_level(), 0.5, 0.0
    op = torch.ops.vicinal.neighborhood_attention
    out, _ = op(q, q, q, None, None, None, None, *settings)
    assert torch.equal(out, op(q, q, q, None, None, [], None, *settings)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(not KERNELS or shutil.which("g++") is None, reason="needs g++ and the kernel")
def test_a_package_runs_without_the_sources(tmp_path: Path) -> None:
    model, rows = Encode().eval(), torch.export.Dim("rows", min=2, max=2**20)
    shapes = {"values": {0: rows}, "coordinates": {0: rows}, "offsets": None}
    package, cases = tmp_path / "encode.pt2", tmp_path / "cases.pt"
    with torch.no_grad():
        program = torch.export.export(model, inputs_of(make_batch(2)), dynamic_shapes=shapes)
        # Two precompiled headers, for one file each, take longer than they save.
        # Loops without vectors, and calls that are not optimized, compile faster.
        options = {
            "aot_inductor.precompile_headers": False,
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "cpp.simdlen": 1,
        }
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=options
        )
        inputs = [inputs_of(make_batch(2, n)) for n in (5, 60)]
        torch.save([(x, model(*x)) for x in inputs], cases)
    run = RUN.format(kernel=str(KERNELS[0]), package=str(package), cases=str(cases))
    assert run_python(run).strip() == "done"
