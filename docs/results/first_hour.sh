#!/usr/bin/env bash
# The first hour of a new user, command by command, with the seconds that each takes; the table goes to docs/results/first_hour.md.
#
#   bash docs/results/first_hour.sh [EMPTY_FOLDER]     in a fresh clone, without a virtual environment
set -euo pipefail
clone=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
table=$work/first_hour.md
printf '| command | seconds |\n|---|---:|\n' > "$table"

# Run a command and write its time. Its first argument is the exit code that is expected.
timed() {
  local expected=$1 began code=0
  shift
  printf '\n$ %s\n' "$*"
  began=$(date +%s.%N)
  "$@" || code=$?
  if [ "$code" != "$expected" ]; then
    echo "exit code $code where $expected was expected" >&2
    exit 1
  fi
  python3 - "$table" "$began" "$@" << 'PYTHON'
import shlex, sys, time
table, began, *command = sys.argv[1:]
text = shlex.join(command).replace("|", "\\|")
open(table, "a").write(f"| `{text}` | {time.time() - float(began):.1f} |\n")
PYTHON
}

# Start a pretraining, and press Ctrl-C (SIGINT) when it has logged its first step.
pretrain_and_stop() {
  local process code=0
  # A background job of a script ignores SIGINT; env gives it back.
  env --default-signal=INT fastssl pretrain "$@" &
  process=$!
  until [ -s runs/first/metrics.jsonl ] || ! kill -0 "$process" 2> /dev/null; do sleep 0.2; done
  kill -INT "$process"
  wait "$process" || code=$?
  return "$code"
}

cd "$clone"
timed 0 make .venv/.installed
export PATH=$clone/.venv/bin:$PATH
cd "$work"
timed 0 python -c "from pathlib import Path; from fastssl.demo.aerial import write_folder; write_folder(Path('drawn'), 400, 0, 64)"
timed 0 fastssl shard drawn/images tile-shards
timed 0 fastssl inspect tile-shards --out overview.png
timed 0 fastssl split tile-shards --val 0.2 --stratify label
timed 0 fastssl preview tile-shards --config laptop --recipe satellite --out views.png
flags=(--data.shards tile-shards --data.split train --recipe satellite --train.out runs/first --train.epochs 6)
timed 130 pretrain_and_stop "${flags[@]}"
timed 0 fastssl pretrain "${flags[@]}" --resume
timed 0 fastssl eval knn runs/first --shards tile-shards --split train --test-split val
timed 0 fastssl report runs/first --out curves.png
timed 0 python -c "
from pipelines import open_loader
loader = open_loader('tile-shards', 'satellite', batch=64)
batch = next(iter(loader))
print(loader, batch, sep='\n')
"
printf '\n'
cat "$table"
