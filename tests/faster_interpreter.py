"""Triton's interpreter with less of its own work; what kernels compute stays the same."""

from typing import Any

import pytest


def speed_up(patches: pytest.MonkeyPatch) -> None:
    """Until the patches are undone."""
    _prepare_once(patches)
    _describe_types_once(patches)


def _prepare_once(patches: pytest.MonkeyPatch) -> None:
    """Makes it patch its language once per kernel and package.

    It patches it for every function that a kernel calls, which takes most of its time.
    """
    from triton.runtime import interpreter

    run, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    done: set[str] = set()

    def run_kernel(self: Any, *arguments: Any, **options: Any) -> None:
        done.clear()
        run(self, *arguments, **options)

    def prepare_once(function: Any) -> Any:
        """Patches for the first function of a package; nested calls restore nothing themselves."""
        package = function.__module__.partition(".")[0]
        if package in done:
            return None
        done.add(package)
        return prepare(function)

    patches.setattr(interpreter.GridExecutor, "__call__", run_kernel)
    patches.setattr(interpreter, "_patch_lang", prepare_once)


def _describe_types_once(patches: pytest.MonkeyPatch) -> None:
    """Makes it keep names and shapes of types, which it writes down again for every number."""
    from triton import language
    from triton.runtime import interpreter

    block, tensor = language.block_type.__init__, language.tensor.__init__
    find_dtype = interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[int, tuple[Any, dict[str, Any]]] = {}  # by shapes, which they keep
    dtypes: dict[str, Any] = {}

    def describe_block(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not language.dtype:  # of pointers, which have no hash
            block(self, element_ty, shape)
            return
        key = element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def describe_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in tensors:
            tensor(self, handle, type)
            own = {"handle", "type", "dtype"}
            tensors[id(shape)] = shape, {k: v for k, v in vars(self).items() if k not in own}
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.__dict__.update(tensors[id(shape)][1])

    def get_np_dtype(described: Any) -> Any:
        if described.name not in dtypes:
            dtypes[described.name] = find_dtype(described)
        return dtypes[described.name]

    patches.setattr(language.block_type, "__init__", describe_block)
    patches.setattr(language.tensor, "__init__", describe_tensor)
    patches.setattr(interpreter, "_get_np_dtype", get_np_dtype)
