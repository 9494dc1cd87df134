#!/bin/sh
# The main job, end to end: this repository goes in, its wheel comes out. Run by `./just demo`, from the repository's root.
set -eu

penstock up --detach
penstock execute -c deploy/demo/task.yml -i penstock=. -o dist=./out

newest() { penstock builds --json | python -c "import json, sys; print(json.load(sys.stdin)[0]['$1'])"; }
url=$(newest url)
number=$(newest number)
printf '\nThe wheel is here:\n'
ls -l out/*.whl
cat <<END

Penstock goes on in the background and listens on ${url%%/api/*}. Next, for instance:

  ./just penstock builds
  ./just penstock logs $number
  ./just penstock download $number -o dist=./out/again
  ./just penstock execute -c deploy/demo/task.yml -i penstock=. -o dist=./out
  ./just down
END
