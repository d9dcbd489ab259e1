"""Layer 2: loads the package etcd3 with a protobuf that is newer than its generated code.

etcd3 0.12.0 carries modules that protobuf's compiler wrote in 2019; protobuf 4 and later refuse them, and pinning an
old protobuf would hold back whatever else a job uses it for. But each of those modules carries the description of its
messages as one literal, from which the installed protobuf makes today's classes. These are registered under the
modules' names before etcd3 is imported. The literals are read, their files never executed.

Runs in the bridge's process only: it imports gRPC, which starts threads.
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
"""In the order in which they need each other."""


def load() -> tuple[Any, Any]:
    """Import gRPC and etcd3.

    Returns:
        The modules ``grpc`` and ``etcd3.etcdrpc``: the latter has etcd's messages and stubs.

    Raises:
        UnavailableError: one is not installed, or etcd3 is not the release that this was written for.
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
            "the installed etcd3 and protobuf do not fit together: pip install 'elastic-launch[etcd]' "
            f"({type(error).__name__}: {error})"
        ) from error


def _register(folder: str) -> None:
    """Make etcd3's message modules from the descriptions in the files of this folder."""
    builder = importlib.import_module("google.protobuf.internal.builder")
    descriptor_pool = importlib.import_module("google.protobuf.descriptor_pool")
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    pool = descriptor_pool.DescriptorPool()  # of its own: another package's kv.proto may be in the default one
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
