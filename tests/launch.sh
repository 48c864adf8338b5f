#!/usr/bin/env bash
# What test_launch.py runs in namespaces of its own, as root: `ray up`, `ray submit`, export, a job, `ray down` on loopback.
# Arguments: a scratch folder with cluster.yaml, and the folder of ray's executable.
set -exuo pipefail
scratch=$1; bin=$2
ip link set lo up
mount -t tmpfs none "$HOME"
mkdir -p /tmp/ray "$scratch/ray" /run/sshd
mount --bind "$scratch/ray" /tmp/ray
cd "$(dirname "$0")/.."

ssh-keygen -q -t ed25519 -N '' -f "$scratch/key"
ssh-keygen -q -t ed25519 -N '' -f "$scratch/host_key"
cp "$scratch/key.pub" "$scratch/authorized_keys"
cat > "$scratch/sshd_config" <<END
ListenAddress 127.0.0.1
HostKey $scratch/host_key
AuthorizedKeysFile $scratch/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile $scratch/sshd.pid
END
/usr/sbin/sshd -f "$scratch/sshd_config"

export PATH=$bin:$PATH RAY_USAGE_STATS_ENABLED=0
"$bin/python" -m imbvlm check-cluster "$scratch/cluster.yaml"
ray up -y --no-config-cache "$scratch/cluster.yaml"
ray submit "$scratch/cluster.yaml" sweeps/quickstart.py --smoke
ray exec "$scratch/cluster.yaml" 'imbvlm export ~/runs/quickstart-* -o ~/my-model'
test -s ~/my-model/model/model.safetensors
echo 'EXPORTED'

# Nobody gets in without the token.
if RAY_AUTH_MODE=disabled ray job submit --address http://127.0.0.1:8265 -- true; then exit 1; fi
echo 'REFUSED WITHOUT TOKEN'
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token
ray job submit --address http://127.0.0.1:8265 --working-dir sweeps -- \
    python quickstart.py --smoke --storage '~/jobs' --set num_trials=2 --set method=linear_probe
ls -d ~/jobs/quickstart-*/best.yaml
echo 'JOB DONE'
# No command line has the token.
if grep -qF "$(cat "$RAY_AUTH_TOKEN_PATH")" <(cat /proc/[0-9]*/cmdline | tr '\0' ' '); then exit 1; fi

ray down -y "$scratch/cluster.yaml"
sleep 2
if pgrep -f 'raylet|gcs_server'; then exit 1; fi
echo 'DOWN'
