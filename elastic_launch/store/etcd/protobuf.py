"""Loads the package etcd3 with a protobuf that is newer than its generated code.

etcd3 0.12.0 contains modules that protobuf's compiler generated in 2019. protobuf 4 and later refuse them. Pinning an
older protobuf would affect everything else that a job uses it for. But each of these modules describes its messages in
one literal, from which the installed protobuf can build classes. These are registered under the names of the modules
before etcd3 is imported. The literals are only read; their files are never executed.

Runs in the bridge's process only, because gRPC starts threads.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
import types
from typing import Any

from elastic_launch.errors import UnavailableError

_LITERAL = re.compile(r"^ *serialized_pb=_b\((?P<literal>['\"].*['\"])\)", re.MULTILINE)
_MODULES = ("kv_pb2", "auth_pb2", "rpc_pb2")
"""In the order of their dependencies."""


def load() -> tuple[Any, Any]:
    """Import gRPC and etcd3.

    Returns:
        The modules ``grpc`` and ``etcd3.etcdrpc``. The latter contains etcd's messages and stubs.

    Raises:
        UnavailableError: A package is not installed, or this is not the supported release of etcd3.
    """
    try:
        spec = importlib.util.find_spec("etcd3")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'etcd3'")
        grpc = importlib.import_module("grpc")
        if "etcd3" not in sys.modules:
            _register(os.path.join(spec.submodule_search_locations[0], "etcdrpc"))
        return grpc, importlib.import_module("etcd3.etcdrpc")
    except ImportError as error:
        raise UnavailableError(
            f"the rendezvous backend etcd needs: pip install 'elastic-launch[etcd]' ({error})"
        ) from None
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UnavailableError(
            "the installed versions of etcd3 and protobuf are incompatible: pip install 'elastic-launch[etcd]' "
            f"({type(error).__name__}: {error})"
        ) from error


def _register(folder: str) -> None:
    """Build etcd3's message modules from the descriptions in the files of this folder."""
    builder = importlib.import_module("google.protobuf.internal.builder")
    descriptor_pool = importlib.import_module("google.protobuf.descriptor_pool")
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    pool = descriptor_pool.DescriptorPool()  # the default pool may contain another package's kv.proto
    for name in _MODULES:
        with open(os.path.join(folder, f"{name}.py"), encoding="utf-8") as file:
            found = _LITERAL.search(file.read())
        if not found:
            raise LookupError(f"no description in {file.name}")
        description = ast.literal_eval(found["literal"]).encode("latin-1")
        pool.AddSerializedFile(description)
        file_descriptor = pool.FindFileByName(descriptor_pb2.FileDescriptorProto.FromString(description).name)
        module = types.ModuleType(f"etcd3.etcdrpc.{name}")
        builder.BuildMessageAndEnumDescriptors(file_descriptor, module.__dict__)
        builder.BuildTopDescriptorsAndMessages(file_descriptor, module.__name__, module.__dict__)
        sys.modules[module.__name__] = module
