"""Every difference between TensorFlow and JAX: variables, sparse gradients, replicas, meshes, random bits.

Their private names are in `keras_optkit.private`.
"""

from keras_optkit.backend.curvature import Recording, hessian_products, recorded
from keras_optkit.backend.placement import Placement, computed, data_axis, placed, placement
from keras_optkit.backend.replicas import (
    in_all_replicas,
    is_one_of_several_replicas,
    refuse_foreign,
    refuse_unsupported_strategy,
    sum_over_replicas,
)
from keras_optkit.backend.sparse import (
    Rows,
    add,
    as_gradient,
    cast,
    dense,
    described_shape,
    is_sparse,
    may_have_shape,
    nonzero_rows,
    rows,
    touched,
)
from keras_optkit.backend.tensors import concatenate, random_bits, split
from keras_optkit.backend.variables import (
    NO_MORE_DATA,
    after,
    assign,
    functions_inlined,
    handle,
    in_checkpoints,
    is_here,
    is_lost,
    key,
    on_cpu,
    on_host,
    outside_graph,
    scope_of,
    tensor,
    traced_once,
    untraced,
)
from keras_optkit.backend.which import TENSORFLOW

__all__ = [
    "NO_MORE_DATA",
    "TENSORFLOW",
    "Placement",
    "Recording",
    "Rows",
    "add",
    "after",
    "as_gradient",
    "assign",
    "cast",
    "computed",
    "concatenate",
    "data_axis",
    "dense",
    "described_shape",
    "functions_inlined",
    "handle",
    "hessian_products",
    "in_all_replicas",
    "in_checkpoints",
    "is_here",
    "is_lost",
    "is_one_of_several_replicas",
    "is_sparse",
    "key",
    "may_have_shape",
    "nonzero_rows",
    "on_cpu",
    "on_host",
    "outside_graph",
    "placed",
    "placement",
    "random_bits",
    "recorded",
    "refuse_foreign",
    "refuse_unsupported_strategy",
    "rows",
    "scope_of",
    "split",
    "sum_over_replicas",
    "tensor",
    "touched",
    "traced_once",
    "untraced",
]
