#compdef vlm
# Completion of vlm for zsh: eval "$(vlm completion zsh)" in ~/.zshrc, or a file named _vlm in a folder of $fpath
_vlm() {
    local -a candidates
    local typed=${(Q)words[CURRENT]#[\'\"]} # (Q) takes quotes and backslashes off, as before a command gets its words
    candidates=("${(@f)$("${(Q)words[1]}" __complete "${(@Q)words[2,CURRENT-1]}" "$typed" 2> /dev/null)}")
    candidates=("${(@)candidates:#}")
    compset -P '*\~/' && candidates=("${(@)candidates#*\~/}") # else compadd would escape the tilde
    compadd -S '' -- "${(@M)candidates:#*[=./]}"
    compadd -- "${(@)candidates:#*[=./]}"
    (( compstate[nmatches] )) # otherwise zsh beeps
}
if [[ ${funcstack[1]} == _vlm ]]; then
    _vlm "$@" # read from $fpath: the first TAB
else
    (( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
    compdef _vlm vlm
fi
