# Completion of vlm for bash: eval "$(vlm completion bash)" in ~/.bashrc
_vlm_complete() {
    local line=${COMP_LINE:0:COMP_POINT} candidate stem= cur
    local -a words
    read -a words <<< "$line" # without -r, which would end a word at an escaped space
    while [[ ${#words[@]} -gt 1 && ${words[0]} != "$1" ]]; do words=("${words[@]:1}"); done
    [[ $line == *[[:space:]] && $line != *\\[[:space:]] ]] && words+=("")
    cur=${words[${#words[@]}-1]}
    if [[ $cur == [\'\"]* ]]; then
        words[${#words[@]}-1]=${cur#[\'\"]} # readline replaces all that follows the quote
    elif [[ $cur == *[=:]* ]]; then
        stem=${cur%"${cur##*[=:]}"} # readline replaces only what follows the last = or : of a word
    fi
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$stem"}")
        [[ $candidate == *[[:space:]]* ]] && compopt -o filenames # escapes spaces
    done < <("$1" __complete "${words[@]:1}" 2> /dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
    return 0
}
complete -F _vlm_complete vlm
