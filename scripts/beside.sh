#!/usr/bin/env bash
# Runs what is given in .venv with libraries beside it that .venv is without, for what they do to everything else:
#     bash scripts/beside.sh explain -m pytest tests/evaluation/test_explanations.py
#     bash scripts/beside.sh attack hfcompress_cli.py run recipes/attack.yaml
#     bash scripts/beside.sh trackers -m pytest tests/methods/test_tracking.py
#     bash scripts/beside.sh torchao -m pytest tests/modeling/test_torchao.py
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
    explain)
        packages=(captum shap slicer==0.0.8 numba llvmlite)
        ;;
    attack)
        # TextAttack imports flair at once, and every flair but this old one names classes that transformers 5 has not;
        # this one asks for a sentencepiece without a wheel. So what is imported is named here, one by one.
        packages=(
            textattack flair==0.11.3 OpenHowNet anytree beautifulsoup4 bert-score boto3 botocore bpemb 'conllu<5'
            deprecated docopt editdistance ftfy gdown gensim jieba jmespath langdetect language_tool_python lemminflect
            Levenshtein lru-dict lxml more-itertools num2words pinyin pptree psutil rapidfuzz s3transfer segtok
            sentencepiece smart_open soupsieve terminaltables toml wcwidth word2number wrapt
        )
        ;;
    trackers)
        # trackio takes no Pillow 13, which .venv has.
        packages=(
            trackio brotli gradio-client httpcore httpx orjson 'pillow<13' python-multipart starlette uvicorn
        )
        ;;
    torchao)
        # With it every import of transformers takes seconds longer and prints warnings.
        packages=("$(grep '^torchao==' scripts/constraints.txt)")
        ;;
    *)
        fail "the first argument is explain, attack, trackers or torchao"
        ;;
esac
beside=.venv/beside/$1
shift

wanted="$(wanted_stamp) ${packages[*]}"
if [[ ! -f $beside.stamp || $(< "$beside.stamp") != "$wanted" ]]; then
    rm -rf "$beside"
    # Without the constraints, of which these libraries may need others.
    "$python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --target "$beside" "${packages[@]}" ||
        fail "pip could not install ${packages[*]} (its message stands above)"
    if [[ -d $beside/textattack ]]; then
        # It reads NLTK's stopwords when it is imported, from a host of NLTK's own; these are scikit-learn's.
        mkdir -p "$beside/nltk_data/corpora/stopwords"
        "$python" -c "
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
print(*sorted(ENGLISH_STOP_WORDS), sep='\n')" > "$beside/nltk_data/corpora/stopwords/english"
    fi
    printf '%s\n' "$wanted" > "$beside.stamp"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
export NLTK_DATA="$PWD/$beside/nltk_data${NLTK_DATA:+:$NLTK_DATA}"
PYTHONPATH="$PWD/$beside${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$@"
