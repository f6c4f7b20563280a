//! What all parts of Kubernetes share: clients, directories, and a look at what is there.

use std::time::{Duration, Instant};
use std::{panic, thread};

use sheave_control::v1 as control;
use sheave_control::{ControlClient, VolumesClient, channel};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tonic::Status;

use super::calls::{Answer, Clients};
use super::check::Found;
use super::claim::{Claim, Kubelet};
use super::ops::{Context, Op};
use super::sim::Setup;
use crate::{PATIENCE, start_runtime};

const PAUSE: Duration = Duration::from_millis(5);

pub(super) struct Orchestrator {
    pub(super) setup: Setup,
    pub(super) kubelet: Kubelet,
    runtime: Handle,
    clients: Clients,
    devices: ControlClient,
    volumes: VolumesClient,
}

impl Orchestrator {
    pub(super) fn new(setup: Setup) -> Self {
        let runtime = start_runtime();
        let (clients, devices, volumes) = {
            let _inside = runtime.enter();
            let control = || channel(&setup.control);
            let clients = Clients::new(&setup.controller, &setup.node).on_slower(setup.slowness);
            (clients, ControlClient::new(control()), VolumesClient::new(control()))
        };
        let kubelet = Kubelet { dir: setup.dir.clone() };
        Self { setup, kubelet, runtime, clients, devices, volumes }
    }

    pub(super) fn context(&self) -> Context<'_> {
        Context {
            kubelet: &self.kubelet,
            node: &self.setup.node_id,
            parameters: &self.setup.parameters,
            grows_later: self.setup.grows_later,
        }
    }

    /// Begins a call, whose caller leaves after `limit`.
    pub(super) fn begin(
        &self,
        claim: &Claim,
        op: &Op,
        limit: Duration,
    ) -> JoinHandle<Result<Answer, Status>> {
        let (clients, call) = (self.clients.clone(), op.call(claim, &self.context()));
        self.runtime.spawn(async move {
            let left = || Err(Status::deadline_exceeded("its caller has left"));
            tokio::time::timeout(limit, clients.call(call)).await.unwrap_or_else(|_| left())
        })
    }

    /// The end of a call.
    pub(super) fn wait<T>(&self, call: JoinHandle<T>) -> T {
        match self.runtime.block_on(call) {
            Ok(answer) => answer,
            Err(error) => panic::resume_unwind(error.into_panic()),
        }
    }

    /// Makes a call, and has its part learn from the answer; true if it is done.
    #[track_caller]
    pub(super) fn call(&self, claim: &mut Claim, op: &Op) -> bool {
        let call = self.begin(claim, op, PATIENCE);
        self.end(claim, op, call)
    }

    /// Waits for a call, and has its part learn from the answer; true if it is done.
    #[track_caller]
    pub(super) fn end(
        &self,
        claim: &mut Claim,
        op: &Op,
        call: JoinHandle<Result<Answer, Status>>,
    ) -> bool {
        let answer = self.wait(call);
        let is_done = answer.is_ok();
        op.learn(claim, answer, &self.context());
        is_done
    }

    /// Checks all claims against what is there, by the daemon's own words.
    #[track_caller]
    pub(super) fn check(&self, claims: &mut [Claim]) {
        self.find().check(claims, &self.kubelet);
    }

    pub(super) fn find(&self) -> Found {
        let begun = Instant::now();
        loop {
            let (mut volumes, mut devices) = (self.volumes.clone(), self.devices.clone());
            let asked = async {
                let volumes = volumes.list_volumes(control::ListVolumesRequest::default()).await?;
                let devices = devices.list_devices(control::ListDevicesRequest {}).await?;
                Ok((volumes.into_inner().volumes, devices.into_inner().devices))
            };
            let answered: Result<_, Status> = self.runtime.block_on(asked);
            match answered {
                Ok((volumes, devices)) => return Found::new(volumes, devices),
                // Its connection may be to a daemon that was killed.
                Err(status) => {
                    assert!(begun.elapsed() < self.setup.slowed(PATIENCE), "the daemon: {status}");
                }
            }
            thread::sleep(PAUSE);
        }
    }
}
