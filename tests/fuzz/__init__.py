# SPDX-License-Identifier: Apache-2.0
"""The differential fuzzer of the operators (docs/fuzzing.md): `python tests/fuzz --help`."""
