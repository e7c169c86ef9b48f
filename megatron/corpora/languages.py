"""Languages of files by their names, in GitHub linguist's terms.

Where linguist would look into a file to decide between languages that share an ending, the most common one is taken.
"""

from __future__ import annotations

_NAMES = """
Ada: .adb .ads
Agda: .agda
Assembly: .asm .s .nasm
Astro: .astro
AWK: .awk
Batchfile: .bat .cmd
BibTeX: .bib .bibtex
Bicep: .bicep
C: .c .h .idc
C#: .cs .csx .cake
C++: .cpp .cc .cxx .c++ .hpp .hh .hxx .h++ .inl .ipp .tcc .tpp .ixx .cppm
Cap'n Proto: .capnp
Chapel: .chpl
Clojure: .clj .cljc .cljs .edn .boot
CMake: .cmake CMakeLists.txt
COBOL: .cob .cbl .cpy
CoffeeScript: .coffee .cson Cakefile
Common Lisp: .lisp .lsp .cl .asd
Rocq Prover: .coq
Crystal: .cr
CSS: .css
CSV: .csv
Cuda: .cu .cuh
Cython: .pyx .pxd .pxi
D: .d .di
Dart: .dart
Dhall: .dhall
Diff: .diff .patch
Dockerfile: .dockerfile Dockerfile Containerfile
Dotenv: .env
EditorConfig: .editorconfig
Elixir: .ex .exs mix.lock
Elm: .elm
Emacs Lisp: .el .emacs
Erlang: .erl .hrl .escript rebar.config
F#: .fs .fsi .fsx
Fennel: .fnl
fish: .fish
Fortran: .f .f77 .for .fpp
Fortran Free Form: .f90 .f95 .f03 .f08
GDScript: .gd
Gettext Catalog: .po .pot
Git Attributes: .gitattributes
Git Config: .gitconfig .gitmodules
GLSL: .glsl .frag .vert .geom .comp .tesc .tese
Go: .go
Go Module: go.mod
Go Checksums: go.sum
Gradle: .gradle
GraphQL: .graphql .gql .graphqls
Graphviz (DOT): .dot .gv
Groovy: .groovy .gvy .gsh Jenkinsfile
Hack: .hack .hhi
Haskell: .hs .hsc
Haxe: .hx
HCL: .hcl .tf .tfvars .nomad
HLSL: .hlsl .fx
HTML: .html .htm .xhtml
Idris: .idr
Ignore List: .gitignore .dockerignore .npmignore .eslintignore .prettierignore
INI: .ini .cfg .prefs .properties
Java: .java .jav
Java Server Pages: .jsp
JavaScript: .js .mjs .cjs .jsx .es6
Jinja: .jinja .jinja2 .j2
JSON: .json .geojson .webmanifest composer.lock
JSON5: .json5
JSON with Comments: .jsonc .code-workspace
Jsonnet: .jsonnet .libsonnet
Julia: .jl
Jupyter Notebook: .ipynb
Just: justfile Justfile
Kotlin: .kt .kts .ktm
Lean: .lean
Less: .less
LLVM: .ll
Lua: .lua .rockspec
M4: .m4 configure.ac
Makefile: .mk .mak .make Makefile makefile GNUmakefile Kbuild
Markdown: .md .markdown .mdown .mkd .mkdn
MATLAB: .matlab
MDX: .mdx
Meson: meson.build meson_options.txt
Mojo: .mojo
NASL: .nasl
Nim: .nim .nims .nimble
Nix: .nix
Objective-C: .m
Objective-C++: .mm
OCaml: .ml .mli .mll .mly
Odin: .odin
OpenCL: .opencl
OpenSCAD: .scad
Org: .org
Pascal: .pas .pp .dpr .lpr
Perl: .pl .pm .perl .t .psgi cpanfile
PHP: .php .php3 .php4 .php5 .phtml
Pip Requirements: requirements.txt
PLSQL: .pls .pks .pkb .plsql
PowerShell: .ps1 .psm1 .psd1
Prisma: .prisma
Prolog: .prolog .pro
Protocol Buffer: .proto
Pug: .pug .jade
Puppet: .puppet
PureScript: .purs
Python: .py .pyi .pyw .py3 .gyp .wsgi SConstruct SConscript wscript BUCK
QML: .qml
R: .r .rd .rsx .Rprofile
Racket: .rkt .rktl
Raku: .raku .rakumod .p6 .pm6
ReScript: .res .resi
reStructuredText: .rst .rest
Roff: .man .1 .2 .3 .4 .5 .6 .7 .8
Ruby: .rb .rake .gemspec .ru .podspec Gemfile Rakefile Vagrantfile Podfile Brewfile
Rust: .rs
Sass: .sass
Scala: .scala .sc .sbt
Scheme: .scm .ss .sld .sls
SCSS: .scss
Shell: .sh .bash .zsh .ksh .command .bats .bashrc .zshrc .profile .bash_profile
Smalltalk: .st
Solidity: .sol
SPARQL: .sparql .rq
SQL: .sql .ddl .dml
Standard ML: .sml .sig .fun
Starlark: .bzl .bazel .star BUILD BUILD.bazel WORKSPACE WORKSPACE.bazel
Stata: .do .ado
Stylus: .styl
Svelte: .svelte
SVG: .svg
Swift: .swift
SystemVerilog: .sv .svh
Tcl: .tcl .tk
TeX: .tex .sty .cls .ltx .dtx .bbx .cbx
Text: .txt .text LICENSE LICENCE COPYING README NOTICE AUTHORS
Textile: .textile
Thrift: .thrift
TOML: .toml Cargo.lock Pipfile poetry.lock uv.lock
TSV: .tsv
TSX: .tsx
TypeScript: .ts .mts .cts
Typst: .typ
Unified Parallel C: .upc
Vala: .vala .vapi
VBScript: .vbs
Verilog: .v .vh .verilog
VHDL: .vhd .vhdl
Vim Script: .vim .vimrc
Visual Basic .NET: .vb .vbhtml
Vue: .vue
WebAssembly: .wat .wast
WGSL: .wgsl
Wolfram Language: .wl .wls .mathematica
XML: .xml .xsd .xsl .xslt .rss .plist .wsdl .csproj .vcxproj .ui
Yacc: .y .yacc
YAML: .yml .yaml .clang-format .clang-tidy
Zig: .zig .zon
"""


def _tables() -> tuple[dict[str, str], dict[str, str]]:
    endings: dict[str, str] = {}
    names: dict[str, str] = {}
    for line in _NAMES.strip().splitlines():
        language, _, rest = line.partition(": ")
        for name in rest.split():
            (endings if name.startswith(".") else names).setdefault(name.lower(), language)
    return endings, names


_BY_ENDING, _BY_NAME = _tables()
LANGUAGES = tuple(line.partition(": ")[0] for line in _NAMES.strip().splitlines())


def language_of(name: str) -> str:
    """The language of a file by its name, path or not ("src/a.py" gives "Python"); "" where the name says nothing."""
    base = name.rpartition("/")[2].lower()
    if (language := _BY_NAME.get(base)) is not None:
        return language
    if base.startswith("dockerfile."):
        return "Dockerfile"
    ending = base.rpartition(".")[2]
    return _BY_ENDING.get(f".{ending}", "") if "." in base else ""
