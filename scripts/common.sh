# Sourced by the scripts beside it.

# Everything that is fetched or built once and does not belong into the tree.
sheave_cache=${SHEAVE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sheave}
cargo_deny_version=0.20.2

# cargo as a child of these scripts must not wait for a person.
export GIT_TERMINAL_PROMPT=0

say() { echo "${0##*/}: $*" >&2; }

die() {
    say "$*"
    exit 1
}

# The pinned cargo-deny, wherever it is.
cargo_deny() {
    local candidate
    for candidate in cargo-deny "$sheave_cache/tools/bin/cargo-deny"; do
        if [ "$("$candidate" --version 2>/dev/null)" = "cargo-deny $cargo_deny_version" ]; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Where cargo puts its results.
target_dir() {
    cargo metadata --no-deps --format-version 1 --offline |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/'
}
