# Completion of vlm for bash: eval "$(vlm completion bash)" in ~/.bashrc
_vlm_complete() {
    local line=${COMP_LINE:0:COMP_POINT} candidate stem= cur
    local -a words
    read -r -a words <<< "$line"
    while [[ ${#words[@]} -gt 1 && ${words[0]} != "$1" ]]; do words=("${words[@]:1}"); done
    [[ $line == *[[:space:]] ]] && words+=("")
    cur=${words[${#words[@]}-1]}
    # readline replaces only what follows the last = or : of a word
    [[ $cur == *[=:]* ]] && stem=${cur%"${cur##*[=:]}"}
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$stem"}")
    done < <("$1" __complete "${words[@]:1}" 2> /dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
    return 0
}
complete -F _vlm_complete vlm
