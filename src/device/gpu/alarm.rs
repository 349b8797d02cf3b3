//! Wakes a task that waits for the device, because nothing else wakes it. A browser does so by itself.

use std::sync::Arc;
use std::task::Waker;
use std::thread;
use std::time::Duration;

use futures::task::AtomicWaker;

/// How many times the task is polled again at once, before a thread wakes it. Short work is done by then, and a blocking call waits in the
/// device instead.
const AT_ONCE: u32 = 8;
const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_millis(1);

/// Wakes one task until it is dropped.
#[derive(Default)]
pub(super) struct Alarm {
    polls: u32,
    /// What the thread wakes, once there is one.
    task: Option<Arc<AtomicWaker>>,
}

impl Alarm {
    /// Wakes the task once more, now or soon.
    pub(super) fn set(&mut self, waker: &Waker) {
        if let Some(task) = &self.task {
            return task.register(waker);
        }
        self.polls += 1;
        if self.polls > AT_ONCE {
            let task = Arc::new(AtomicWaker::new());
            task.register(waker);
            if start(&task).is_ok() {
                self.task = Some(task);
                return;
            }
            // Without a thread the task is polled again at once, as before.
        }
        waker.wake_by_ref();
    }
}

fn start(task: &Arc<AtomicWaker>) -> std::io::Result<()> {
    let task = Arc::downgrade(task);
    let wake = move || {
        let mut pause = SHORTEST;
        loop {
            thread::sleep(pause);
            let Some(task) = task.upgrade() else { return };
            task.wake();
            // The pause grows in proportion to the time since the start, so that it prolongs no wait by much.
            pause = (pause * 9 / 8).min(LONGEST);
        }
    };
    thread::Builder::new().name("wgpu-attention".into()).spawn(wake).map(drop)
}
