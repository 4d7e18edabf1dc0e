#!/bin/sh
# Puts a table into benches/RESULTS.md, between the marks <!-- NAME --> and <!-- end of NAME -->.
#
#   sh scripts/compare_table.sh NAME HEADING <TABLE
#
# Where the marks are missing, they are appended under HEADING.
set -eu
cd "$(dirname "$0")/.."
name=$1 heading=$2
results=benches/RESULTS.md

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/table"
grep -qx "<!-- $name -->" "$results" ||
    printf '\n## %s\n\n<!-- %s -->\n<!-- end of %s -->\n' "$heading" "$name" "$name" >>"$results"
awk -v name="$name" -v table="$folder/table" '
    $0 == "<!-- end of " name " -->" { while ((getline line < table) > 0) print line; inside = 0 }
    !inside { print }
    $0 == "<!-- " name " -->" { inside = 1 }' "$results" >"$folder/results"
cp "$folder/results" "$results"
