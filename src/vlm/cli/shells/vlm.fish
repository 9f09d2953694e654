# Completion of vlm for fish: vlm completion fish > ~/.config/fish/completions/vlm.fish
function __vlm_complete
    set -l words (commandline -opc)
    $words[1] __complete $words[2..] (commandline -ct) 2> /dev/null
end
complete -c vlm -f -a '(__vlm_complete)'
