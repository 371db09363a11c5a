# SPDX-License-Identifier: Apache-2.0
"""Print wgmma.cuh: for each N, wrappers of wgmma.mma_async with A in shared memory (ss) and in registers (rs)."""

print("#pragma once\n#include <cstdint>\n")
print("template <int N>\nstruct Wgmma;\n")
for n in range(8, 257, 8):
    count = n // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16"

    def body(a, first, transposes):
        return (
            f'    asm volatile(\n        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{first + 1}, 0;\\n"\n'
            f'        "{name} {{{sums}}}, {a}, %{first}, p, 1, 1, {transposes};\\n}}\\n"\n'
            f"        : {operands}\n        : "
        )

    print(f"template <>\nstruct Wgmma<{n}> {{")
    print(f"  static __device__ __forceinline__ void ss(float (&d)[{count}], uint64_t a, uint64_t b, int add) {{")
    print(body(f"%{count}", count + 1, "0, 0") + '"l"(a), "l"(b), "r"(add));\n  }')
    print(
        f"  static __device__ __forceinline__ void rs(float (&d)[{count}], const uint32_t (&a)[4], "
        "uint64_t b, int add) {"
    )
    registers = ", ".join(f"%{count + i}" for i in range(4))
    print(
        body(f"{{{registers}}}", count + 4, "0")
        + '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));\n  }\n};\n'
    )
