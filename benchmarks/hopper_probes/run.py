# SPDX-License-Identifier: Apache-2.0
"""Run each probe in a separate process with a time limit, and collect their JSON lines.

python run.py [--executable build/hopper_probes/hopper_probes] [--out FILE.jsonl] [--only NAME ...] [--seconds 30]

`--check` runs `device` and the probes of layouts only. It exits with 1 unless each fact that the kernels rely on is
confirmed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

# `device` and the probes of layouts measure no time and may run at once; the others run alone.
TOGETHER = ["device", "planes", "rows", "fragments"]
CONVOLUTIONS = [f"convolution_{layout}{cluster}" for cluster in ("", "_cluster") for layout in ("planes", "rows")]
ALONE = ["wgmma", "tma", *CONVOLUTIONS, "mma", "red", "l2", "hbm", "latency", "launch"]
LIMIT = 10  # seconds of one process
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(executable: str, name: str, limit: float) -> list[dict]:
    """Return the findings of one probe; a crash or an expired limit is a finding too. Earlier lines are kept."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([executable, name], stdout=output, stderr=errors)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            status = "timed out"
        output.seek(0)
        errors.seek(0)
        lines, message = output.read().splitlines(), errors.read()
    findings = []
    for line in lines:
        try:
            findings.append(json.loads(line))
        except ValueError:
            findings.append({"probe": name, "text": line})
    end = {"probe": name, "status": status, "seconds": round(time.monotonic() - begin, 2)}
    if message:
        end["stderr"] = message[-1000:]
    return [*findings, end]


def broken_facts(findings: list[dict]) -> list[str]:
    """Return the facts that kernels and the SIMT interpreter rely on, but that these findings do not confirm."""
    facts = {
        "TMA swizzles by address": [
            finding["fit_xor_by_address"] == finding["pieces"]
            for finding in findings
            if finding.get("question") == "swizzle of TMA"
        ],
        "wgmma reads rows at shifted starts with base offset 0": [
            finding["right"] == finding["starts"]
            for finding in findings
            if finding.get("question") == "A with 128-byte swizzle at shifted starts"
            and finding["base_offset_field"] == "0"
        ],
        "fragments of m64nNk16 have the documented layout": [
            finding["sizes_right"] == finding["of"]
            for finding in findings
            if finding.get("probe") == "fragments" and "of" in finding
        ],
    }
    return [fact for fact, confirmations in facts.items() if not confirmations or not all(confirmations)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executable", default=str(ROOT / "build/hopper_probes/hopper_probes"))
    parser.add_argument("--out", help="file the JSON lines are appended to")
    parser.add_argument("--only", nargs="+", choices=TOGETHER + ALONE)
    parser.add_argument("--seconds", type=float, default=30, help="time limit of all probes together")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 unless the card has the layouts that kernels rely on"
    )
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    chosen = TOGETHER if arguments.check else arguments.only or TOGETHER + ALONE
    all_findings: list[dict] = []

    def report(findings: list[dict]) -> None:
        all_findings.extend(findings)
        lines = "".join(json.dumps(finding) + "\n" for finding in findings)
        print(lines, end="", flush=True)
        if arguments.out:
            with open(arguments.out, "a") as file:
                file.write(lines)

    def limited(name: str) -> list[dict]:
        left = end - time.monotonic()
        if left <= 0:
            return [{"probe": name, "status": "skipped: no time left"}]
        return run(arguments.executable, name, min(LIMIT, left))

    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        for findings in pool.map(limited, [name for name in TOGETHER if name in chosen]):
            report(findings)
    for name in ALONE:
        if name in chosen:
            report(limited(name))
    broken = broken_facts(all_findings) if arguments.check else []
    if arguments.check:
        print(
            "not confirmed on this card: " + "; ".join(broken)
            if broken
            else "the card has the layouts that kernels rely on"
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
