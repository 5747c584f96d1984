"""Trains on digits with each compression under horovodrun, and prints what each costs and gives.

    python examples/demo.py
    python examples/demo.py --framework tensorflow

The same table is left in results/demo.json, demo-tensorflow.json or demo-keras.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from horovod_powersgd.launcher import launch_command, launch_environment

RUNS = [["none"], ["fp16"], ["powersgd", "--rank", "1"], ["powersgd", "--rank", "2"], ["powersgd", "--rank", "4"]]
FRAMEWORKS = {
    "torch": ("PyTorch", "torch_digits.py", "demo.json"),
    "tensorflow": ("TensorFlow", "tensorflow2_digits.py", "demo-tensorflow.json"),
    "keras": ("Keras", "keras_digits.py", "demo-keras.json"),
}
HERE = Path(__file__).parent
ROW = "{:<18}{:>14}{:>18}{:>10}{:>18}"


def run(script, arguments, workers):
    """The result of one training run."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        program = [sys.executable, str(HERE / script), "--compression", *arguments]
        program += ["--results", str(results)]
        command = launch_command("horovodrun --gloo", workers, program)
        if command is None:
            sys.exit("horovodrun is not installed. Run: python -m horovod_powersgd install-horovod")
        environment = {**launch_environment(), "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        job = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if job.returncode != 0:
            sys.exit(f"{job.stdout}\n{' '.join(command)} failed with exit status {job.returncode}")
        return json.loads(results.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    framework, script, file = FRAMEWORKS[args.framework]

    print(f"scikit-learn's handwritten digits, {args.workers} workers, {framework}, horovodrun\n")
    print(ROW.format("compression", "test accuracy", "sent per epoch", "ratio", "time per batch"))
    rows = []
    for arguments in RUNS:
        row = run(script, arguments, args.workers)
        rows.append(row)
        label = row["compression"] + (f" rank {row['rank']}" if row["rank"] else "")
        print(
            ROW.format(
                label,
                f"{row['test_accuracy']:.1%}",
                f"{row['bytes_per_epoch'] / 1e6:.2f} MB",
                f"{row['ratio']:.0f}x",
                f"{row['ms_per_batch']:.1f} ms",
            ),
            flush=True,
        )
    results = HERE.parent / "results" / file
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nalso in {results}")


if __name__ == "__main__":
    main()
