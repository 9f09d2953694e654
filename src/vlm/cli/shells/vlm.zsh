#compdef vlm
# Completion of vlm for zsh: eval "$(vlm completion zsh)" in ~/.zshrc, behind compinit
_vlm() {
    local -a candidates
    candidates=("${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2> /dev/null)}")
    candidates=("${(@)candidates:#}")
    compadd -S '' -- "${(@M)candidates:#*[=./]}"
    compadd -- "${(@)candidates:#*[=./]}"
}
compdef _vlm vlm
