#!/bin/sh
# Makes all that docs/quality/ holds, and docs/quality.md of it:
#
#   sh models/evaluate.sh HELD-OUT JOURNALS [PART...]
#
# HELD-OUT: folder with the text that was held out in training, and no other. JOURNALS: folder for
# what is finished; the same command goes on from there. The reports stay there, too, until all is
# made: changed files in docs/ would make other code of this checkout. PART: ablation, needle, ruler, perplexity,
# budget, compression; all of them if none is named. MODEL=PATH in the environment: another model
# than the built-in one. Takes hours on two cores.
set -eu
texts=$(realpath "$1") journals=$(realpath -m "$2")
shift 2
model=${MODEL:+$(realpath "$MODEL")}
cd "$(dirname "$0")/.."
model=${model:-razor_local/data/razor-default.gguf}
reports=$journals/reports
mkdir -p "$reports" docs/quality
book=$(ls "$texts"/*.txt)
all=full,full-q8_0,full-q4_0,razor,razor-q8_0,razor-q4_0,razor-no-comp,local,streaming
all=$all,random-heads=1,random-heads=2,random-heads=3

# measure NAME COMMAND...: a report as text and as JSON of one run
measure() {
    name=$1
    shift
    razor-local eval "$@" --resume "$journals/$name.jsonl" -o "$reports/$name.md"
    razor-local eval "$@" --resume "$journals/$name.jsonl" -o "$reports/$name.json"
}

# study NAME OPTIONS...
study() {
    name=$1
    shift
    python models/compression_study.py "$book" "$model" "$@" -o "$reports/$name.json" \
        > "$journals/$name.part"
    mv "$journals/$name.part" "$reports/$name.md"
}

for part in ${*:-ablation needle ruler perplexity budget compression}; do
    case $part in
    ablation) study ablation -c 2k --slices 8 --samples 1 --ablation ;;
    needle)
        measure needle needle "$model" -c 4k,8k --haystack "$texts" --samples 8 \
            --kinds single,reworded,keys --policies full,razor,razor-q8_0,local,random-heads=1 \
            --plot "$reports/needle.png"
        ;;
    ruler) measure ruler ruler "$model" -c 4k --haystack "$texts" --samples 10 --policies $all ;;
    perplexity)
        measure perplexity perplexity "$model" --text "$book" -c 8k --policies $all \
            --plot "$reports/perplexity.png"
        ;;
    budget)
        measure budget needle "$model" -c 4k --haystack "$texts" --kinds single,keys --samples 6 \
            --policies full,full-q8_0,razor,razor-q8_0,local \
            --budget 0.05,0.1,0.15,0.2,0.3 --plot-curve "$reports/budget.png"
        ;;
    compression) study compression -c 4k --slices 8 --samples 1 ;;
    *)
        echo "evaluate.sh: no part is called '$part'" >&2
        exit 2
        ;;
    esac
done
mv "$reports"/* docs/quality
rmdir "$reports"
python models/quality_doc.py
