"""Other ways to compute the same, one small file each.

A baseline, of a label and a function, sets up its own work and the library's, or raises
`CaseSkipped` with the reason why it cannot run. It imports the packages it needs only then.
"""

from benchmarks.baselines import deformable, dense, flex, gathering, pairs

BASELINES = {
    "gathering": ("gather and project, whole block", gathering.prepare),
    "pairs": ("plain PyTorch, a row per pair", pairs.prepare),
    "pairs-block": ("plain PyTorch pairs, whole block", pairs.prepare_block),
    "edges": ("PyTorch Geometric, edge list", pairs.prepare_edges),
    "flex": ("FlexAttention, points as stored", flex.prepare),
    "flex-sorted": ("FlexAttention, points along a curve", flex.prepare_sorted),
    "dense": ("NATTEN on the densified map", dense.prepare),
    "deformable": ("deformable attention, equal keys", deformable.prepare),
    "deformable-sparse": ("deformable attention, our kernel", deformable.prepare_sparse),
}
