#!/bin/sh
# The main job, end to end: this repository goes in, its wheel comes out. Run by `./just demo`, from the repository's root.
set -eu

penstock up --detach
penstock execute -c deploy/demo/task.yml -i penstock=. -o dist=./out

url=$(python -c 'import json, os; file = json.load(open(os.environ["PENSTOCK_TARGETS"])); print(file["targets"]["local"]["url"])')
printf '\nThe wheel is here:\n'
ls -l out/*.whl
cat <<END

Penstock goes on in the background and listens on $url. Next, for instance:

  ./just penstock builds
  ./just penstock logs 1
  ./just penstock download 1 -o dist=./again
  ./just penstock execute -c deploy/demo/task.yml -i penstock=. -o dist=./out
  ./just down
END
