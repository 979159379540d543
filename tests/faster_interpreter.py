"""Triton's interpreter with less of its own work; what kernels compute stays the same."""

import dataclasses
import inspect
from typing import Any

import pytest


def speed_up(patches: pytest.MonkeyPatch) -> None:
    """Until the patches are undone."""
    _skip_unread_checks(patches)
    _prepare_once(patches)
    _describe_types_once(patches)
    _pair_types_once(patches)
    _call_directly(patches)
    _prepare_loads_once(patches)


def _skip_unread_checks(patches: pytest.MonkeyPatch) -> None:
    """Makes it not search sums and products of integers for overflow: it drops what it finds.

    It would raise an error where kernels are debugged, which takes six more operations each.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    if not options.debug:
        quiet = dataclasses.replace(options, sanitize_overflow=False)
        patches.setattr(interpreter.interpreter_builder, "options", quiet)


def _prepare_once(patches: pytest.MonkeyPatch) -> None:
    """Makes it patch its language once per kernel and package, and search it for that just once.

    It patches it for every function that a kernel calls, which takes most of its time.
    """
    from triton import language
    from triton.runtime import interpreter

    run, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    done: set[str] = set()
    builtins: dict[Any, list[tuple[str, Any]]] = {}

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

    def replace_builtins(owner: Any, *context: Any) -> None:
        if owner not in builtins:
            members = inspect.getmembers(owner)
            builtins[owner] = [x for x in members if language.core.is_builtin(x[1])]
        for name, function in builtins[owner]:
            interpreter._patch_attr(owner, name, function, *context)

    patches.setattr(interpreter, "_patch_builtin", replace_builtins)
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


def _pair_types_once(patches: pytest.MonkeyPatch) -> None:
    """Makes it keep the types to which it brings two operands, and leave their shapes to NumPy.

    It writes a scalar, or a row of a block, as often as the other operand has elements.
    """
    from triton import language
    from triton.runtime import interpreter

    semantic, tensor = interpreter.interpreter_semantic, language.tensor
    pair_types = semantic.binary_op_type_checking_impl
    pairs: dict[Any, tuple[Any, Any]] = {}

    def describe(operand: Any) -> Any:
        if isinstance(operand, tensor):
            return operand.type.name
        return type(operand), operand, str(operand)  # zeros have signs

    def pair_once(lhs: Any, rhs: Any, *rules: Any, **others: Any) -> tuple[Any, Any]:
        key = describe(lhs), describe(rhs), rules, *others.items()
        if key not in pairs:
            left, right = pair_types(lhs, rhs, *rules, **others)
            pairs[key] = keep(lhs, left), keep(rhs, right)
        return convert(lhs, pairs[key][0]), convert(rhs, pairs[key][1])

    def keep(operand: Any, paired: Any) -> Any:
        """The type of what became of an operand, or all of it if the operand is a number."""
        return paired.type if isinstance(operand, tensor) else paired

    def convert(operand: Any, kept: Any) -> Any:
        if not isinstance(operand, tensor):
            return kept
        if operand.type.name == kept.name:
            return operand
        if operand.dtype.name != kept.scalar.name:
            operand = semantic.cast(operand, kept.scalar)
        return tensor(operand.handle, kept)

    patches.setattr(semantic, "binary_op_type_checking_impl", pair_once)


def _call_directly(patches: pytest.MonkeyPatch) -> None:
    """Makes it call a function of its language without two others around it.

    Of most arguments it need not search what they contain.
    """
    from triton import language
    from triton.runtime import interpreter

    unwrap = language.core._unwrap_if_constexpr
    plain = {language.tensor, language.dtype, int, float, bool, str, type(None)}

    def unwrap_value(value: Any) -> Any:
        kind = type(value)
        if kind is language.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    def replace(owner: Any, name: str, function: Any, builder: Any, scope: Any) -> None:
        semantic = interpreter.interpreter_semantic
        function = getattr(function, "__wrapped__", function)

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return function(*arguments, **options)

        scope.set_attr(owner, name, call)

    patches.setattr(interpreter, "_patch_attr", replace)
    patches.setattr(language.core, "_unwrap_if_constexpr", unwrap_value)


def _prepare_loads_once(patches: pytest.MonkeyPatch) -> None:
    """Makes it keep masks that are all true, and the zeros of masked elements."""
    import numpy as np
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    handles: dict[Any, Any] = {}

    def get_handle(shape: Any, value: int, described: Any) -> Any:
        key = shape, value, described.name
        if key not in handles:
            data = np.full(shape, value, dtype=interpreter._get_np_dtype(described))
            handles[key] = interpreter.TensorHandle(data, described)
        return handles[key]

    def load_masked(
        self: Any, pointers: Any, mask: Any, other: Any, *options: Any, **named: Any
    ) -> Any:
        if other is None:
            other = get_handle(pointers.data.shape, 0, pointers.get_element_ty())
        return load(self, pointers, mask, other, *options, **named)

    def load_all(self: Any, pointers: Any, *options: Any) -> Any:
        mask = get_handle(pointers.data.shape, 1, language.int1)
        return load_masked(self, pointers, mask, None, *options)

    def store_all(self: Any, pointers: Any, value: Any, *options: Any) -> Any:
        mask = get_handle(pointers.data.shape, 1, language.int1)
        return store(self, pointers, value, mask, *options)

    patches.setattr(builder, "create_masked_load", load_masked)
    patches.setattr(builder, "create_load", load_all)
    patches.setattr(builder, "create_store", store_all)
