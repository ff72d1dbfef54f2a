/* Stands between pyfuse3 and libfuse, for what pyfuse3 has no way to say: see desfs/levers.py.
 *
 * This library exports libfuse's fuse_session_new. Loaded with RTLD_GLOBAL before pyfuse3, it is found first when the
 * loader binds pyfuse3's call: a definition without a version satisfies a reference to fuse_session_new@FUSE_3.0 (glibc,
 * elf/dl-lookup.c). It hands pyfuse3's table of operations on with a few of them replaced.
 */
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 35
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NS 1000000000
#define LARGE_REPLY (128 * 1024) /* bytes: 50 us, ten times what giving the lock away and taking it costs */
#define PAUSE_US 50 /* in which the kernel makes some twenty inodes of a listing */

/* From libfuse 3.17 on fuse_session_new is a macro over a function that takes the version of its caller's headers. */
#undef fuse_session_new
struct libfuse_version;
typedef int reply_buf(fuse_req_t, const char *, size_t);
typedef struct fuse_session *new_session(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *new_versioned(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                           struct libfuse_version *, void *);

/* Set by Python before the session is made, and read by the one thread that serves requests. */
static int enabled, bound, opens_alone, lists_alone;
static unsigned max_background;
static struct fuse_conn_info agreed;
static struct fuse_lowlevel_ops ours, theirs;
static struct fuse_session *session;

/* The listing that was asked for last, and the one that is ready to be sent. pyfuse3 runs the handler of a request at
 * once, up to its first await, and replies as soon as it returns: there is never more than one of each. */
struct listing {
    fuse_req_t req;
    char *entries;
    size_t size, used;
};
static struct listing listing, ready;

static void init(void *userdata, struct fuse_conn_info *conn)
{
    if (theirs.init)
        theirs.init(userdata, conn);
    opens_alone = (conn->capable & FUSE_CAP_NO_OPEN_SUPPORT) != 0;
    lists_alone = (conn->capable & FUSE_CAP_NO_OPENDIR_SUPPORT) != 0;
    conn->max_background = max_background;
    conn->congestion_threshold = max_background / 4 * 3;
    /* Else O_TRUNC is left to an OPEN that is not sent any more; now it is a SETATTR, which is refused. */
    conn->want &= ~FUSE_CAP_ATOMIC_O_TRUNC;
    agreed = *conn;
}

static void open_file(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (opens_alone && (fi->flags & O_ACCMODE) == O_RDONLY && !(fi->flags & O_TRUNC))
        fuse_reply_err(req, ENOSYS); /* the kernel opens every file by itself from now on */
    else
        theirs.open(req, ino, fi);
}

static void open_directory(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (lists_alone)
        fuse_reply_err(req, ENOSYS);
    else
        theirs.opendir(req, ino, fi);
}

/* After ENOSYS the kernel has no handle to send, and pyfuse3 hands on nothing but the handle: make it the inode. */
static void read_file(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    fi->fh = ino;
    theirs.read(req, ino, size, off, fi);
}

static void list_directory(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    fi->fh = ino;
    listing = (struct listing){.req = req, .size = size};
    theirs.readdirplus(req, ino, size, off, fi);
}

static void write_file(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *data, off_t off, struct fuse_file_info *fi)
{
    fi->fh = ino;
    theirs.write_buf(req, ino, data, off, fi);
}

static const struct fuse_lowlevel_ops *replaced(const struct fuse_lowlevel_ops *ops, size_t size)
{
    if (ops == &ours) /* libfuse's one function called by its other */
        return ops;
    bound = 1;
    if (!enabled || size > sizeof(ours) || !ops->open || !ops->opendir || !ops->read || !ops->readdirplus ||
        !ops->write_buf)
        return ops;
    memset(&theirs, 0, sizeof(theirs));
    memcpy(&theirs, ops, size);
    ours = theirs;
    ours.init = init;
    ours.open = open_file;
    ours.opendir = open_directory;
    ours.read = read_file;
    ours.readdirplus = list_directory;
    ours.write_buf = write_file;
    return &ours;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
                                      void *userdata)
{
    new_session *real = (new_session *)dlsym(RTLD_NEXT, "fuse_session_new");
    return session = real ? real(args, replaced(ops, size), size, userdata) : NULL;
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                                size_t size, struct libfuse_version *version, void *userdata)
{
    new_versioned *real = (new_versioned *)dlsym(RTLD_NEXT, "fuse_session_new_versioned");
    return session = real ? real(args, replaced(ops, size), size, version, userdata) : NULL;
}

static PyObject *enable(PyObject *self, PyObject *args)
{
    if (!PyArg_ParseTuple(args, "I", &max_background))
        return NULL;
    enabled = 1;
    Py_RETURN_NONE;
}

/* pyfuse3 replies to READDIRPLUS with a buffer that it filled entry by entry. Where one is ready here it has none. */
int fuse_reply_buf(fuse_req_t req, const char *buf, size_t size)
{
    static reply_buf *real;
    if (!real && !(real = (reply_buf *)dlsym(RTLD_NEXT, "fuse_reply_buf")))
        return -ENOSYS;
    int result;
    if (!size && ready.entries && ready.req == req) {
        result = real(req, ready.entries, ready.used);
        free(ready.entries);
        ready.entries = NULL;
    } else if (size >= LARGE_REPLY && PyGILState_Check()) {
        /* pyfuse3 keeps Python's lock while the kernel copies, and the threads that fetch what comes next wait for it. */
        Py_BEGIN_ALLOW_THREADS;
        result = real(req, buf, size);
        Py_END_ALLOW_THREADS;
    } else
        result = real(req, buf, size);
    return result;
}

/* What `begin_entries` needs, for the handler of the listing that was asked for last; None where nothing came this way. */
static PyObject *asked_listing(PyObject *self, PyObject *args)
{
    struct listing asked = listing;
    listing.req = NULL;
    if (!asked.req)
        Py_RETURN_NONE;
    return Py_BuildValue("Kn", (unsigned long long)(uintptr_t)asked.req, (Py_ssize_t)asked.size);
}

/* (request, size): what is added from now on is sent when the handler of that request returns; not if `drop_entries`. */
static PyObject *begin_entries(PyObject *self, PyObject *args)
{
    unsigned long long req;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "Kn", &req, &size))
        return NULL;
    free(ready.entries);
    ready = (struct listing){.req = (fuse_req_t)(uintptr_t)req, .size = size, .entries = malloc(size)};
    return ready.entries ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *drop_entries(PyObject *self, PyObject *args)
{
    free(ready.entries);
    ready.entries = NULL;
    Py_RETURN_NONE;
}

/* (names, columns, uid, gid, blksize, timeout_s): a list of bytes, and i64[5, n]: cookie, inode, mode, size, mtime_ns. How
 * many there was room for. */
static PyObject *add_entries(PyObject *self, PyObject *args)
{
    PyObject *names;
    Py_buffer columns;
    unsigned uid, gid, block;
    double timeout;
    if (!PyArg_ParseTuple(args, "O!y*IIId", &PyList_Type, &names, &columns, &uid, &gid, &block, &timeout))
        return NULL;
    const Py_ssize_t n = PyList_GET_SIZE(names);
    const int64_t *column = columns.buf;
    Py_ssize_t i = -1;
    if (ready.entries && columns.len == 5 * n * (Py_ssize_t)sizeof(*column))
        for (i = 0; i < n; i++) {
            const int64_t cookie = column[i], inode = column[n + i], size = column[3 * n + i];
            const struct timespec at = {.tv_sec = column[4 * n + i] / NS - (column[4 * n + i] % NS < 0),
                                        .tv_nsec = (column[4 * n + i] % NS + NS) % NS};
            struct fuse_entry_param entry = {.ino = inode, .attr_timeout = timeout, .entry_timeout = timeout};
            entry.attr = (struct stat){.st_ino = inode, .st_mode = column[2 * n + i], .st_nlink = 1, .st_uid = uid,
                                       .st_gid = gid, .st_size = size, .st_blksize = block,
                                       .st_blocks = size / 512 + (size % 512 != 0), .st_atim = at, .st_mtim = at, .st_ctim = at};
            const char *name = PyBytes_AsString(PyList_GET_ITEM(names, i));
            if (!name)
                break;
            size_t length = fuse_add_direntry_plus(ready.req, ready.entries + ready.used, ready.size - ready.used, name,
                                                   &entry, cookie);
            if (length > ready.size - ready.used)
                break;
            ready.used += length;
        }
    PyBuffer_Release(&columns);
    if (i < 0)
        PyErr_SetString(PyExc_ValueError, ready.entries ? "columns of another length" : "no listing was begun");
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(i);
}

/* Files that wait to be put into the page cache. Of each, `files` has four u64: inode, offset in data, length, row; a byte
 * of `pages` for each row is Python's as well. Taken by one thread, which does not hold Python's lock then: a lock would
 * have it wait behind the very reader for whom it is in a hurry. */
struct push {
    Py_buffer data, files, pages;
    struct push *next;
};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct push *waiting, **end_of_waiting = &waiting;
static volatile int stopping;

static void release(struct push *push)
{
    while (push) {
        struct push *next = push->next;
        PyBuffer_Release(&push->data);
        PyBuffer_Release(&push->files);
        PyBuffer_Release(&push->pages);
        free(push);
        push = next;
    }
}

static PyObject *queue_pages(PyObject *self, PyObject *args)
{
    struct push *push = calloc(1, sizeof(*push));
    if (!push)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "y*y*w*", &push->data, &push->files, &push->pages)) {
        free(push);
        return NULL;
    }
    const uint64_t(*file)[4] = push->files.buf;
    int sound = session != NULL;
    for (Py_ssize_t i = 0; i < push->files.len / (Py_ssize_t)sizeof(*file); i++)
        sound &= file[i][3] < (uint64_t)push->pages.len && file[i][1] <= (uint64_t)push->data.len &&
                 file[i][2] <= (uint64_t)push->data.len - file[i][1];
    if (!sound) {
        release(push);
        PyErr_SetString(PyExc_ValueError, session ? "a file is not inside the buffers" : "there is no session");
        return NULL;
    }
    if (stopping) {
        release(push);
        Py_RETURN_NONE;
    }
    pthread_mutex_lock(&lock);
    *end_of_waiting = push;
    end_of_waiting = &push->next;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
    Py_RETURN_NONE;
}

/* counts: stored, unknown, refused, the last errno, the bytes of what was stored. A row whose byte has a bit of `skip` is
 * left out; the others get `mark`, and 0 if the kernel does not take them. It is told of a listing's inodes just before, and
 * given `patience_us` in all to make them. */
static void store(const struct push *push, unsigned skip, unsigned mark, long patience_us, uint64_t counts[5])
{
    const uint64_t(*file)[4] = push->files.buf;
    const Py_ssize_t n = push->files.len / (Py_ssize_t)sizeof(*file);
    for (Py_ssize_t i = 0; i < n && !stopping; i++) {
        volatile uint8_t *page = (uint8_t *)push->pages.buf + file[i][3];
        int result;
        if (*page & skip)
            continue;
        *page |= mark;
        for (;; patience_us -= PAUSE_US) {
            struct fuse_bufvec bytes = FUSE_BUFVEC_INIT(file[i][2]);
            bytes.buf[0].mem = (char *)push->data.buf + file[i][1];
            result = fuse_lowlevel_notify_store(session, file[i][0], 0, &bytes, 0);
            if (result != -ENOENT || patience_us <= 0 || stopping)
                break;
            usleep(PAUSE_US);
        }
        if (result) {
            *page = 0;
            counts[3] = -result;
        } else {
            counts[4] += file[i][2];
        }
        counts[result == 0 ? 0 : result == -ENOENT ? 1 : 2]++;
    }
}

/* (skip, mark, patience_us, most): wait for what is queued, and store it, until nothing is left or `most` bytes of data have
 * been stored from: they are held until then. (stored, unknown, refused, the last errno, how many were queued, the bytes of
 * what was stored); None when stopped. */
static PyObject *serve_pages(PyObject *self, PyObject *args)
{
    unsigned skip, mark;
    uint64_t counts[5] = {0, 0, 0, 0, 0};
    long patience_us;
    struct push *done = NULL;
    Py_ssize_t size = 0, batches = 0, most;
    if (!PyArg_ParseTuple(args, "IIln", &skip, &mark, &patience_us, &most))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!waiting && !done && !stopping)
            pthread_cond_wait(&changed, &lock);
        struct push *push = waiting;
        if (!push || stopping || size >= most)
            break;
        waiting = push->next;
        if (!waiting)
            end_of_waiting = &waiting;
        pthread_mutex_unlock(&lock);
        store(push, skip, mark, patience_us, counts);
        size += push->data.len;
        batches++;
        push->next = done;
        done = push;
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    Py_END_ALLOW_THREADS;
    release(done);
    if (stopping) {
        release(waiting);
        waiting = NULL;
        end_of_waiting = &waiting;
        Py_RETURN_NONE;
    }
    return Py_BuildValue("KKKKnK", (unsigned long long)counts[0], (unsigned long long)counts[1],
                         (unsigned long long)counts[2], (unsigned long long)counts[3], batches,
                         (unsigned long long)counts[4]);
}

static PyObject *stop_pages(PyObject *self, PyObject *args)
{
    pthread_mutex_lock(&lock);
    stopping = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    Py_RETURN_NONE;
}

static PyObject *state(PyObject *self, PyObject *args)
{
    return Py_BuildValue("{s:N,s:N,s:N,s:I,s:I,s:I}", "bound", PyBool_FromLong(bound), "no_open",
                         PyBool_FromLong(opens_alone), "no_opendir", PyBool_FromLong(lists_alone), "max_background",
                         agreed.max_background, "max_readahead", agreed.max_readahead, "max_write", agreed.max_write);
}

static PyMethodDef methods[] = {
    {"enable", enable, METH_VARARGS, "Replace operations in the next session; max_background: requests in flight."},
    {"asked_listing", asked_listing, METH_NOARGS, "The listing that was asked for last: (request, size)."},
    {"begin_entries", begin_entries, METH_VARARGS, "Begin the reply to a listing."},
    {"add_entries", add_entries, METH_VARARGS, "Add entries to the reply; how many there was room for."},
    {"drop_entries", drop_entries, METH_NOARGS, "Leave the reply to pyfuse3."},
    {"queue_pages", queue_pages, METH_VARARGS, "Have files put into the kernel's page cache."},
    {"serve_pages", serve_pages, METH_VARARGS, "Put what is queued into the kernel's page cache."},
    {"stop_pages", stop_pages, METH_NOARGS, "End serve_pages."},
    {"state", state, METH_NOARGS, "What the session came to."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_levers", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__levers(void)
{
    return PyModule_Create(&module);
}
