# shellcheck shell=bash
# run_folder DEFAULT_NAME OPTIONS...: sets `name` and `folder` to what the trainer's --run.name and --run.root say among
# OPTIONS, the last one counting; the name is DEFAULT_NAME where they say nothing. For the other scripts to source.
run_folder() {
    name=$1
    local root=runs option previous=
    shift
    for option in "$@"; do
        case $previous in
            --run.name) name=$option ;;
            --run.root) root=$option ;;
        esac
        case $option in
            --run.name=*) name=${option#*=} ;;
            --run.root=*) root=${option#*=} ;;
        esac
        previous=$option
    done
    # shellcheck disable=SC2034 # the caller reads it
    folder=$root/$name
}
