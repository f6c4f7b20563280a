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

# The Debian mirror that this machine already uses.
debian_mirror() {
    local codename
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v release="$codename" '$2 == release && $3 == "main" { print $1; exit }'
}

# Sets the array `private_apt` to an apt-get for another suite, whose state is in a directory of
# its own and which thinks that no package is installed.
private_apt() {
    local dir=$1 suite=$2 uri keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    uri=$(debian_mirror)
    [ -n "$uri" ] || die 'no Debian package source found on this machine'
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    echo "deb [signed-by=$keyring] $uri $suite main" >"$dir/sources.list"
    : >"$dir/status"
    private_apt=(
        apt-get -qq -y -o "Dir::State=$dir/state" -o "Dir::State::status=$dir/status"
        -o "Dir::Cache=$dir/cache" -o "Dir::Etc::sourcelist=$dir/sources.list"
        -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferences=/dev/null
        -o Dir::Etc::preferencesparts=/dev/null -o APT::Sandbox::User=root
        -o Acquire::Languages=none -o Acquire::Retries=3 -o Acquire::http::Timeout=30
    )
    "${private_apt[@]}" update >&2
}
